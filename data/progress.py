"""How far long work is, told alike by all commands: what, how many, the rate, the time left, and where the result goes.

On a terminal that is a bar of tqdm. Elsewhere, as in a log file, it is a line a minute and one at the end.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from multiprocessing import parent_process
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TextIO, TypeVar

from data.checks import count, one_line
from data.interrupt import interrupted

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

# Between two lines where there is no terminal.
LINE_SECONDS = 60.0

_state = {"quiet": False}
_open: list["Progress"] = []


def be_quiet() -> None:
    """Tell no progress in this process from here on: the flag -q of all commands."""
    _state["quiet"] = True


def is_quiet() -> bool:
    """Whether be_quiet was called."""
    return _state["quiet"]


def shows_bars() -> bool:
    """Whether this process tells progress on a terminal."""
    return _tells() and sys.stderr.isatty()


def end_lines() -> None:
    """End the lines of all bars, so that an error which follows has one of its own."""
    while _open:
        _open[-1].close(finished=False)


class LogLines(logging.StreamHandler):
    """Prints what is logged, on a terminal above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        if not (_open and shows_bars()):
            super().emit(record)
            return
        from tqdm import tqdm  # here: on a terminal alone

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class Progress:
    """A piece of work that is under way, as a context. It is silent after be_quiet and where nothing is to be done.

    Of several ranks, or tasks of Slurm, the first one tells it, and of a process with workers the process.

    what: the work, in a word or two.  total: how many there are, None if that is not known.  unit: what one of them is.
    to: where the result will be, '' for work that is a step on the way.  start: how many were done in earlier starts;
    the rate and the time left are those of this one.
    """

    def __init__(self, what: str, total: int | None, unit: str, to: str | Path = "", start: int = 0) -> None:
        self.what, self.to = one_line(what), one_line(str(to), 200)
        self.total, self.unit = total, unit
        self.start = self.done = start
        self._began = self._told = monotonic()
        self._beside: dict[str, object] = {}
        self._tells = (total is None or start < total) and _tells()
        self._bar: tqdm | None = None
        if self._tells:
            _open.append(self)
            if shows_bars():
                self._bar = self._make_bar()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(finished=kind is None)

    def update(self, number: int = 1, beside: Mapping[str, object] | None = None) -> None:
        """So many more are done.  beside: values to show from now on, by name, in the place of those before."""
        self.done += number
        if beside is not None:
            self._beside = dict(beside)
        if self._bar is not None and not interrupted():
            if beside is not None:
                self._bar.set_postfix(self._beside, refresh=False)
            if not self._bar.update(number) and beside is not None:
                self._bar.refresh()
        elif self._tells and self._bar is None and self.done != self.total and monotonic() - self._told >= LINE_SECONDS:
            self._print(ended=False)

    def write(self, line: str, file: TextIO | None = None) -> None:
        """Print a line, on a terminal above the bar; to stdout by default. It is no progress and always told."""
        if self._bar is not None:
            self._bar.write(line, file=file or sys.stdout)
        else:
            print(line, file=file or sys.stdout, flush=True)

    def close(self, finished: bool = True) -> None:
        """End the bar, or print the last line.  finished: not after an error, which then is told alone."""
        if self in _open:
            _open.remove(self)
        if self._bar is not None:
            self._bar.disable |= interrupted()  # the line of the bar has ended already
            self._bar.close()
        elif self._tells and finished and not interrupted():
            self._print(ended=True)
        self._tells, self._bar = False, None

    def _make_bar(self) -> "tqdm":
        from tqdm import tqdm  # here: on a terminal alone

        counted, uncounted = "{l_bar}{bar}{r_bar}", "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]"
        form = uncounted if self.total is None else counted
        to = f" to {self.to}".replace("{", "{{").replace("}", "}}") if self.to else ""
        return tqdm(
            desc=self.what, total=self.total, initial=self.start, unit=f" {self.unit}", smoothing=0.05,
            file=sys.stderr, dynamic_ncols=True, bar_format=form + to,
        )  # fmt: skip

    def _print(self, ended: bool) -> None:
        self._told = monotonic()
        of_this_start, seconds = self.done - self.start, monotonic() - self._began
        parts = [count(self.done, self.unit)]
        if self.total is not None:
            parts = [f"{self.done:,} of {count(self.total, self.unit)} ({100 * self.done // max(self.total, 1)} %)"]
        if of_this_start and seconds:
            each = seconds / of_this_start
            rate = f"{1 / each:,.0f}" if each < 0.01 else f"{1 / each:.3g}"
            parts.append(f"{rate} {self.unit}s/s" if each < 1 else f"{each:,.3g} s/{self.unit}")
            if self.total is not None and not ended:
                parts.append(f"{duration(each * max(self.total - self.done, 0))} left")
        if ended:
            parts.append(f"{f'{of_this_start:,} of them ' if self.start else ''}in {duration(seconds)}")
        parts += [f"{name} {value}" for name, value in self._beside.items()]
        if self.to:
            parts.append(f"to {self.to}")
        print(f"{self.what}: {', '.join(parts)}", file=sys.stderr, flush=True)


def each(items: Iterable[T], what: str, unit: str, to: str | Path = "", total: int | None = None) -> Iterator[T]:
    """The items, and how many of them are done, as Progress tells it.  total: if their number is not to be asked."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit, to) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """A time in words: '15 s', '12 min', '3 h 20 min', '2 d 4 h'."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _tells() -> bool:
    """Whether this process tells progress: it is the first rank or task, and no worker."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return number == "0" and parent_process() is None and not is_quiet()
