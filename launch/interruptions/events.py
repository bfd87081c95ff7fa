"""A training of days as a sequence of starts, faults and time limits, drawn from their rates."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# What ends a start, beside the faults.
BEGIN, LIMIT = "first start", "time limit"
# What a fault costs: until all ranks have ended, in the queue, until the first step, and steps made again.
PARTS = ("end", "wait", "start", "redo")
# Faults after which the node is left out.
TAKES_NODE = ("node", "link", "corruption")
# Faults that nothing tells: the ranks wait until one of them ends by its watchdog.
SILENT = ("link", "hang")
# Slurm's warning before the end of a job (launch/slurm/train.sbatch), and how long it keeps a requeued job from
# starting again (cred_expire of its AuthInfo, by default).
WARNING_SECONDS, REQUEUE_SECONDS = 600.0, 120.0


# A run that takes so many times as long as its steps, or starts so often, is taken to never end.
LONGEST, MOST_STARTS = 100, 50_000


class NeverEnds(ValueError):
    """A run is taken to never end."""


@dataclass(frozen=True)
class Life:
    """A run in seconds and steps.

    steps: of the run.  step: seconds of one.  save_every: steps.
    copy: seconds by which a save stops the training.  write: from then until the checkpoint can be resumed from.
    rates: faults a second, by kind.  hang: until ranks that wait end by themselves.  end: from the death of a rank to
    the end of all.  start, load: until the first step.  compiling, cached: the first step without and with a cache.
    job: time limit, 0 for none.  queue: mean wait beyond REQUEUE_SECONDS.
    in_place, spares, shared_cache, memory_every: as in LifetimeOptions.  check_every: of the training.
    """

    steps: int
    step: float
    save_every: int
    copy: float
    write: float
    rates: dict[str, float]
    hang: float
    end: float
    start: float
    load: float
    compiling: float
    cached: float
    job: float
    queue: float
    in_place: bool
    spares: int
    shared_cache: bool
    check_every: int
    memory_every: int

    @cached_property
    def pause(self) -> float:
        """By which a save makes the run longer: the copy, and the wait for the one before if that is not written."""
        return self.copy + max(0.0, self.write - self.save_every * self.step)

    @cached_property
    def rate(self) -> float:
        """Faults a second, of all kinds."""
        return sum(self.rates.values())

    def elapsed(self, begin: int, end: int) -> float:
        """Seconds from one step to another, their saves included."""
        return (end - begin) * self.step + self.pause * (end // self.save_every - begin // self.save_every)

    def made(self, begin: int, seconds: float) -> tuple[int, int]:
        """The steps that are made so long after step `begin`, and that of the last complete checkpoint since, or it."""
        offset = begin % self.save_every
        since, cycle = seconds + offset * self.step, self.save_every * self.step + self.pause
        saves, rest = divmod(since, cycle)
        of_cycle = min(int(rest / self.step), self.save_every)
        written = int((since - self.write) // cycle)
        first = begin - offset
        made = first + int(saves) * self.save_every + of_cycle
        return max(begin, min(made, self.steps)), max(begin, first + written * self.save_every)

    def until_first_step(self, cold: bool, loads: bool) -> float:
        """Seconds of a start.  cold: no cache of torch.compile on one of the nodes.  loads: there is a checkpoint."""
        return self.start + (self.load if loads else 0.0) + (self.compiling if cold else self.cached)

    def until_all_ended(self, kind: str, made: int) -> float:
        """Seconds from a fault to the end of all ranks, in which a wrong result goes on to the next look."""
        if kind in SILENT:
            return self.hang
        to_check = (self.check_every - made % self.check_every) * self.step if kind == "corruption" else 0.0
        return to_check + self.end


@dataclass(slots=True)
class Outcome:
    """One run.

    seconds: from its first start to its last step.  lost: seconds by (cause, part).  saving: by which saves stopped it.
    redone: steps made again.  faults: by kind.  requeues: of the job.
    """

    seconds: float = 0.0
    lost: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    saving: float = 0.0
    redone: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    requeues: int = 0

    @property
    def waited(self) -> float:
        """Seconds in the queue, where the job has no node."""
        return sum(seconds for (_, part), seconds in self.lost.items() if part == "wait")


def simulate(life: Life, random: np.random.Generator) -> Outcome:
    """One run, its faults a Poisson process. Faults strike a start too; what is ending or queued has none.

    Raises: NeverEnds.
    """
    kinds, shares = list(life.rates), np.array(list(life.rates.values())) / life.rate
    out = Outcome(saving=life.pause * (life.steps // life.save_every))
    lost = out.lost
    # The step that a start begins from, and that of the last checkpoint: after a copy in memory an earlier one.
    begin, stored = 0, 0
    cause, cold, spares = BEGIN, True, life.spares
    job_ends = life.job or np.inf

    def requeue() -> None:
        nonlocal job_ends, spares, cold
        wait = REQUEUE_SECONDS + random.exponential(life.queue) if life.queue else REQUEUE_SECONDS
        lost[cause, "wait"] += wait
        out.seconds += wait
        out.requeues += 1
        # Other nodes may be among those of the next job.
        job_ends, spares, cold = out.seconds + (life.job or np.inf), life.spares, cold or not life.shared_cache

    for _ in range(MOST_STARTS):
        if out.seconds > LONGEST * life.steps * life.step:
            break
        starts = life.until_first_step(cold, loads=begin > 0)
        whole = starts + life.elapsed(begin, life.steps)
        fault, limit = random.exponential(1 / life.rate), max(0.0, job_ends - out.seconds - WARNING_SECONDS)
        if whole <= min(fault, limit):
            lost[cause, "start"] += starts
            out.seconds += whole
            return out
        until = min(fault, limit)
        cold = cold and until < starts
        lost[cause, "start"] += min(starts, until)
        ran = max(0.0, until - starts)
        made, saved = life.made(begin, ran)
        stored = saved if saved > begin else stored
        if limit <= fault:
            cause, end = LIMIT, life.copy + life.write
            lost[cause, "end"] += ran - life.elapsed(begin, made) + end
            out.seconds += until + end
            begin = stored = made
            requeue()
            continue
        cause = kinds[random.choice(len(kinds), p=shares)]
        out.faults[cause] += 1
        takes_node = cause in TAKES_NODE
        in_place = life.in_place and (not takes_node or spares > 0)
        in_memory = bool(life.memory_every) and in_place and cause != "corruption"
        kept = max(stored, made - made % life.memory_every) if in_memory else stored
        end = life.until_all_ended(cause, made)
        redo = ran - life.elapsed(begin, kept)
        lost[cause, "redo"] += max(0.0, redo)
        out.saving += min(0.0, redo)  # of a save that the fault cuts short
        lost[cause, "end"] += end
        out.redone += made - kept
        out.seconds += until + end
        begin = kept
        if in_place:
            spares, cold = spares - takes_node, cold or (takes_node and not life.shared_cache)
        else:
            requeue()
    raise NeverEnds(
        f"a run with a fault every {1 / life.rate:,.0f} s, starts of up to {life.until_first_step(True, True):,.0f} s "
        f"and jobs of {life.job / 3600:g} h (0: no limit) never ends: lower the rates, shorten the start, or raise "
        "job_hours"
    )


def simulate_runs(life: Life, runs: int) -> list[Outcome]:
    """Runs from the seeds 0, 1, ...; the same each time."""
    return [simulate(life, np.random.default_rng(seed)) for seed in range(runs)]


def shares(life: Life, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Effective training time of each run: the time that its steps take, over all of its time."""
    return life.steps * life.step / np.array([outcome.seconds for outcome in outcomes])
