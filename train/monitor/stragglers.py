"""The slowest rank, by the time in which no rank waits for another."""

import os
from collections import deque
from dataclasses import dataclass
from statistics import median_low

import torch.distributed as dist
from torch import Tensor

from train.faults.quarantine import node_name
from train.monitor.phases import OWN

# A rank is judged by the median of its last lines, so that one pause makes no straggler.
LINES = 5
# And those lines hold so many seconds of the usual own time at least: a few short steps scatter.
MIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs.  gpu: its number among those of the node's ranks."""

    node: str
    gpu: int


class Stragglers:
    """Finds the rank that is furthest behind the others; on all ranks the same one.

    slowest: where it runs; None before it is known for sure, or with one rank alone.
    """

    def __init__(self) -> None:
        self.slowest: Place | None = None
        self._places: list[Place] = []
        self._lines: deque[list[list[float]]] = deque(maxlen=LINES)

    def add(self, own: Tensor) -> dict[str, float]:
        """Add the own seconds [ranks, OWN] of a line; what to log, nothing before there are LINES of them.

        The first line is left out: in its first step the net may be compiled. A collective call at that line.
        straggler_behind: the share by which the slowest rank's own time is above the median of all ranks, of two ranks
        the faster one's. straggler_PHASE: by how much it is above the median of that phase, as a share of the same.
        """
        if len(own) == 1:
            return {}
        if not self._places:
            self._places = [Place("", 0)] * len(own)
            dist.all_gather_object(self._places, Place(node_name(), int(os.environ.get("LOCAL_RANK", "0"))))
            return {}
        self._lines.append(own.tolist())
        if len(self._lines) < LINES:
            return {}
        of_ranks = [
            [median_low(times) for times in zip(*lines, strict=True)] for lines in zip(*self._lines, strict=True)
        ]
        whole = [sum(times) for times in of_ranks]
        rank, usual = max(range(len(whole)), key=whole.__getitem__), max(median_low(whole), 1e-9)
        own_seconds = sum(sum(median_low(times) for times in zip(*line, strict=True)) for line in self._lines)
        self.slowest = self._places[rank] if own_seconds >= MIN_SECONDS else None
        values = {"straggler_rank": float(rank), "straggler_behind": whole[rank] / usual - 1}
        for i, phase in enumerate(OWN):
            values[f"straggler_{phase}"] = (of_ranks[rank][i] - median_low(times[i] for times in of_ranks)) / usual
        return values
