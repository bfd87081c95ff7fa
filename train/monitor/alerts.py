"""Alerts: the loss is not finite or spikes, or the run has stalled."""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

# A loss is compared with the log lines before it: at most WINDOW of them, and not before there are MIN_LINES.
WINDOW, MIN_LINES = 100, 20
# A spike lies this many standard deviations above their median, and above this multiple of it.
SPIKE_SIGMAS, SPIKE_RATIO = 6.0, 1.5
# A stall: no log line for this many times the longest interval so far, and for at least this many seconds.
STALL_INTERVALS, STALL_SECONDS = 5.0, 120.0


class Alerts:
    """Checks each log line and, in a thread of its own, that log lines keep coming.

    notify: called with a title and a text, from either thread; once for each title until a check finds it cured.
    """

    def __init__(self, notify: Callable[[str, str], None], stall_seconds: float = STALL_SECONDS) -> None:
        self._notify, self._stall_seconds = notify, stall_seconds
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._active: set[str] = set()
        self._last, self._longest = time.monotonic(), math.inf  # the first interval includes the compilation
        self._lines = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
        self._thread.start()

    def check(self, step: int, values: dict[str, float]) -> None:
        """Check the values of a log line."""
        now = time.monotonic()
        if self._lines:
            self._longest = max(self._longest, now - self._last) if self._lines > 1 else now - self._last
        self._last, self._lines = now, self._lines + 1
        loss = values["loss"]
        skipped = values.get("skipped_steps", 0)
        self._set(
            "loss not finite", not math.isfinite(loss) or skipped > 0,
            f"step {step}: loss {loss:g}, {skipped:.0f} steps skipped since the last line; look at RUN_DIR/quarantine",
        )  # fmt: skip
        if not math.isfinite(loss):
            return
        if len(self._losses) >= MIN_LINES:
            median, deviation = statistics.median(self._losses), statistics.pstdev(self._losses)
            spikes = loss > median + SPIKE_SIGMAS * deviation and loss > SPIKE_RATIO * median
            self._set(
                "loss spike", spikes,
                f"step {step}: loss {loss:.4g}, the median of the {len(self._losses)} lines before is {median:.4g}",
            )  # fmt: skip
            if spikes:
                return  # kept out of the window, or the next spike would look usual
        self._losses.append(loss)

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
