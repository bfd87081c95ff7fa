"""The closed form of a run that saves every so often and meets faults: a check of the simulation."""

import math

from launch.interruptions.events import REQUEUE_SECONDS, TAKES_NODE, WARNING_SECONDS, Life


def share(life: Life) -> float:
    """Effective training time in the long run.

    Exact where a save stops the training for as long as it takes, all faults cost the same and a start can fail too;
    otherwise faults cost their mean, and what is not written yet is added to it.
    Source: Daly 2006, 'A higher order estimate of the optimum checkpoint interval for restart dumps'.
    """
    between, period = 1 / life.rate, life.save_every * life.step
    restart = mean_restart(life) + life.write
    try:
        expected = between * math.exp(restart / between) * math.expm1((period + life.pause) / between)
    except OverflowError:
        return 0.0
    if not life.job:
        return period / expected
    # In each job: the save at its end, the wait, and the next start.
    ending = life.copy + life.write + REQUEUE_SECONDS + life.queue
    ending += life.until_first_step(not life.shared_cache, loads=True)
    running = life.job - WARNING_SECONDS
    return period / expected * (1 - ending / (running + ending))


def mean_restart(life: Life) -> float:
    """Seconds from a fault to the first step after it, on average over the kinds, if a spare is there for each."""
    total = 0.0
    for kind, rate in life.rates.items():
        takes_node = kind in TAKES_NODE
        in_place = life.in_place and (life.spares > 0 or not takes_node)
        wait = 0.0 if in_place else REQUEUE_SECONDS + life.queue
        cold = not life.shared_cache and (takes_node or not in_place)
        to_check = life.check_every // 2 if kind == "corruption" else 0
        total += rate * (life.until_all_ended(kind, to_check) + wait + life.until_first_step(cold, loads=True))
    return total / life.rate


def young(life: Life) -> float:
    """The best save_every where saves are short.  Source: Young 1974, 'A first order approximation to the optimum
    checkpoint interval'."""
    return math.sqrt(2 * life.copy / life.rate) / life.step


def daly(life: Life) -> float:
    """The best save_every, to a higher order.  Source: Daly 2006."""
    ratio = life.copy * life.rate / 2
    if ratio >= 1:
        return 1 / life.rate / life.step
    root = math.sqrt(ratio)
    return (math.sqrt(2 * life.copy / life.rate) * (1 + root / 3 + ratio / 9) - life.copy) / life.step
