"""The time of a step by phase; on a GPU by events in its stream, read when it has passed them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "step", "save", "sample", "validate")
# Timed on the host. Of the other phases the device keeps the time: the host only enqueues their work.
ON_HOST = ("data", "save", "sample", "validate")
# Phases of a rank's own time, in which it waits for no other rank.
OWN = ("data", "forward", "backward")


class PhaseTimes:
    """Seconds by phase, and a rank's own: those of a step in which no collective makes it wait for the others.

    In steps that are made together all ranks take the same time, and a slow one is the one that waits least. The
    gradients are summed during the last backward of a step, and the weights are gathered by the engine's step. All
    before is a rank's own: to load, the forwards, and the backwards but the last.
    On a GPU the own time for data is that in which the device had nothing to do: it waited for its host.
    """

    def __init__(self, device: torch.device, accumulation: int) -> None:
        self._on_gpu, self._accumulation = device.type == "cuda", accumulation
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._own = dict.fromkeys(OWN, 0.0)
        self._backwards = 0
        # Phases that the device may not have passed yet; None for what the host did in between.
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event] | None] = []
        self._before: torch.cuda.Event | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as one of PHASES."""
        if self._on_gpu and name not in ON_HOST:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if not self._on_gpu:
            self._add(name, seconds)
            return
        self.seconds[name] += seconds
        if name != "data":
            self._events.append(None)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self._backwards += name == "backward"
        waits = name == "backward" and self._backwards % self._accumulation == 0
        if name in OWN and not waits:
            self._own[name] += seconds

    def read(self) -> None:
        """Read the events that the device has passed, without waiting for it; the others are left for later."""
        while self._events and (self._events[0] is None or self._events[0][2].query()):
            event = self._events.pop(0)
            if event is None:
                self._before = None
                continue
            name, start, end = event
            self._add(name, start.elapsed_time(end) / 1000)
            if self._before:
                self._own["data"] += self._before.elapsed_time(start) / 1000
            self._before = end

    def own(self) -> list[float]:
        """Own seconds, by OWN, that were read since the last call."""
        found, self._own = self._own, dict.fromkeys(OWN, 0.0)
        return list(found.values())

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; what comes before the next phase is not the step's."""
        found, self.seconds, self._before = self.seconds, dict.fromkeys(PHASES, 0.0), None
        return found
