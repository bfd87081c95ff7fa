"""What all parts share: the rows that they give, and what they know of the device and of their time."""

import importlib.util
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# The parts in the order in which they run, each with its share of the time; what one leaves is the later ones'.
PARTS = {
    "environment": 15,
    "parity": 50,
    "fewbit_recompute": 90,
    "resume": 60,
    "syncs": 40,
    "memory": 50,
    "nccl": 15,
    "overlap": 100,
    "speed": 180,
}

# The results that a row can have. PLANNED is replaced by a later row of the same name, or becomes NOT_MEASURED.
HOLDS, FAILED, MEASURED, LEFT_OUT, NOT_MEASURED = "holds", "FAILED", "measured", "left out", "not measured"
PLANNED = "planned"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was looked at, the result, the result in words, and its numbers for the JSON."""

    name: str
    result: str
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Check:
    """What a part is given.

    device: 'cuda' or 'cpu'. tiny: nets and batches that a CPU runs in a second. shapes: the nets of the parts that
    measure. seconds: after so many the process of the part is killed.
    """

    device: str = "cpu"
    tiny: bool = True
    shapes: tuple[str, ...] = ("512",)
    seconds: float = 60.0
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the part is killed."""
        return self.seconds - (time.monotonic() - self.started)


def verdict(name: str, holds: bool, text: str, **figures: Any) -> Row:
    """A row of something that must hold."""
    return Row(name, HOLDS if holds else FAILED, text, figures)


def needs_gpu(name: str, what: str) -> Row:
    """A row that only a GPU can fill."""
    return Row(name, LEFT_OUT, f"needs a GPU: {what}")


def planned(names: Iterable[str]) -> Iterator[Row]:
    """Rows that say what is to come, so that it can be named if the time runs out."""
    for name in names:
        yield Row(name, PLANNED)


def missing(*packages: str) -> list[str]:
    """Those of the packages that this Python does not have."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def attempt(name: str, measure: Callable[[], Row]) -> Row:
    """The row that measure() returns; after an error a row that says so, so that the part goes on."""
    try:
        return measure()
    except Exception as error:
        return of_error(name, error)


def of_error(name: str, error: Exception) -> Row:
    """A row for an error: a net that is too large for the card is not measured, all else has failed."""
    import torch  # not at the top: the command that starts the parts does without

    if isinstance(error, torch.OutOfMemoryError):
        return Row(name, NOT_MEASURED, "does not fit into the card's memory")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    trace = "".join(traceback.format_exception(error))
    return Row(name, FAILED, f"{type(error).__name__}: {lines[0][:200]}", {"traceback": trace[-4000:]})


def run_part(name: str, check: Check) -> Iterator[Row]:
    """The rows of one part, in this process; without what the part needs, one row that says so."""
    part = import_module(f"tests.gpu_check.{name}")
    absent = missing(*getattr(part, "NEEDS", ()))
    if absent:
        yield Row(name, LEFT_OUT, f"needs {', '.join(absent)}")
        return
    try:
        yield from part.run(check)
    except Exception as error:
        yield of_error(name, error)
