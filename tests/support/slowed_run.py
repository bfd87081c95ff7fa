"""A training in which ranks are slowed in turns: slowed_run.py SLOWER STEPS OVERRIDES, as train/main.py.

SLOWER: the share by which the slowed rank takes longer for what it does alone.  STEPS: of a turn, each of two micro
batches; the turns are those of turns_of(ranks), again and again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from data.cli import arguments
from train.main import main

# Phases in which a slowed rank loses its time.
SLOW_IN = ("data", "forward")


def turns_of(ranks: int) -> list[tuple[int, str]]:
    """The slowed rank of each turn, -1 for none, and the phase."""
    return [(-1, ""), *((rank, phase) for rank in range(ranks) for phase in SLOW_IN)]


def slow_in_turns(slower: float, steps: int) -> None:
    """Have this rank sleep in the phase of its turn, for a share of the time that it took since for its own work.

    So it is behind by that share however fast its core is, or however busy.
    """
    from train.monitor.metrics import Metrics
    from train.monitor.phases import OWN

    own_rank, turns = int(os.environ["RANK"]), turns_of(int(os.environ["WORLD_SIZE"]))
    phase_of, add_step = Metrics.phase, Metrics.add_step
    made, backwards, owed = 0, 0, 0.0

    @contextmanager
    def phase(metrics: Metrics, name: str) -> Iterator[None]:
        nonlocal backwards, owed
        with phase_of(metrics, name):
            began = time.perf_counter()
            yield
            backwards += name == "backward"
            if name in OWN and not (name == "backward" and backwards % 2 == 0):
                owed += slower * (time.perf_counter() - began)
            rank, slow_in = turns[made // steps % len(turns)]
            if name == slow_in and rank == own_rank:
                time.sleep(owed)
                owed = 0.0
            elif rank != own_rank:
                owed = 0.0

    def count(metrics: Metrics, engine: object) -> None:
        nonlocal made
        made += 1
        add_step(metrics, engine)

    Metrics.phase, Metrics.add_step = phase, count


if __name__ == "__main__":
    slower, steps, *overrides = arguments(None)
    slow_in_turns(float(slower), int(steps))
    main(overrides)
