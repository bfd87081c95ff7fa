"""Alerts: the loss is not finite, the error leaps, a rank is behind the others, or the run has stalled."""

import math
import threading
import time
from collections.abc import Callable

from train.monitor.phases import OWN
from train.monitor.stragglers import LINES, Place

STRAGGLER = "straggler"
# A straggler's own time is this share above the median of all ranks, over LINES lines.
BEHIND = 0.1
# A stall: no log line for this many times the longest interval so far, and for at least this many seconds.
STALL_INTERVALS, STALL_SECONDS = 5.0, 120.0


class Alerts:
    """Checks each log line and, in a thread of its own, that log lines keep coming.

    notify: called with a title and a text, from either thread; once for each title until a check finds it cured.
    """

    def __init__(self, notify: Callable[[str, str], None], stall_seconds: float = STALL_SECONDS) -> None:
        self._notify, self._stall_seconds = notify, stall_seconds
        self._active: set[str] = set()
        self._last, self._longest = time.monotonic(), math.inf  # the first interval includes the compilation
        self._lines = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
        self._thread.start()

    def check(self, step: int, values: dict[str, float], slowest: Place | None = None) -> None:
        """Check the values of a log line.  slowest: where the rank runs that is furthest behind the others."""
        now = time.monotonic()
        if self._lines:
            self._longest = max(self._longest, now - self._last) if self._lines > 1 else now - self._last
        self._last, self._lines = now, self._lines + 1
        if slowest:
            self._check_straggler(step, values, slowest)
        loss = values["loss"]
        skipped = values.get("skipped_steps", 0)
        self._set(
            "loss not finite", not math.isfinite(loss) or skipped > 0,
            f"step {step}: loss {loss:g}, {skipped:.0f} steps skipped since the last line; look at RUN_DIR/quarantine",
        )  # fmt: skip
        spikes = values.get("spikes", 0)
        self._set(
            "spike", spikes > 0,
            f"step {step}: the mse or the gradient norm of {spikes:.0f} steps since the last line leaps; each is told "
            "after the word SPIKE, with the samples of its batch",
        )  # fmt: skip

    def _check_straggler(self, step: int, values: dict[str, float], slowest: Place) -> None:
        title, behind = f"{STRAGGLER} {slowest.node} GPU {slowest.gpu}", values["straggler_behind"]
        for other in [name for name in self._active if name.startswith(STRAGGLER) and name != title]:
            self._active.discard(other)
        phase = max(OWN, key=lambda name: values[f"straggler_{name}"])
        self._set(
            title, behind > BEHIND,
            f"step {step}: rank {values['straggler_rank']:.0f} is {behind:.0%} behind the median of all ranks over "
            f"{LINES} lines, {values[f'straggler_{phase}']:.0%} of it in {phase}; all ranks wait for it",
        )  # fmt: skip

    def close(self) -> None:
        """Stop checking: the run is over."""
        self._closed.set()
        self._thread.join()

    def _set(self, title: str, bad: bool, text: str) -> None:
        if bad and title not in self._active:
            self._notify(title, text)
        (self._active.add if bad else self._active.discard)(title)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._stall_seconds / 4, 10.0)):
            quiet = time.monotonic() - self._last
            limit = max(self._stall_seconds, STALL_INTERVALS * self._longest)
            self._set("stall", quiet > limit, f"no log line for {quiet:.0f} s; before, {self._longest:.0f} s at most")
