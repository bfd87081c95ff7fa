"""What should wake somebody up: a loss that is not finite or leaps, and a run that has come to a stop."""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

# A loss is judged against so many log lines before it, and not before there are MIN_LINES of them.
LINES, MIN_LINES = 100, 20
SIGMAS, TIMES = 6.0, 1.5
# Without a log line for so many of the longest interval so far, and for at least so many seconds.
STALL_INTERVALS, STALL_SECONDS = 5.0, 120.0


class Alerts:
    """Looks at each log line and, in a thread of its own, whether they keep coming.

    tell: called with a title and a text, from either thread; the same title not twice in a row of lines.
    """

    def __init__(self, tell: Callable[[str, str], None], stall_seconds: float = STALL_SECONDS) -> None:
        self._tell, self._least = tell, stall_seconds
        self._losses: deque[float] = deque(maxlen=LINES)
        self._told: set[str] = set()
        self._last, self._longest = time.monotonic(), math.inf  # the first interval has the compilation in it
        self._lines = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
        self._thread.start()

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Judge a log line."""
        now = time.monotonic()
        if self._lines:
            self._longest = max(self._longest, now - self._last) if self._lines > 1 else now - self._last
        self._last, self._lines = now, self._lines + 1
        loss = metrics["loss"]
        skipped = metrics.get("skipped_steps", 0)
        self._judge(
            "loss not finite", not math.isfinite(loss) or skipped > 0,
            f"step {step}: loss {loss:g}, {skipped:.0f} steps skipped since the last line; look at RUN_DIR/quarantine",
        )  # fmt: skip
        if not math.isfinite(loss):
            return
        if len(self._losses) >= MIN_LINES:
            middle, spread = statistics.median(self._losses), statistics.pstdev(self._losses)
            leaps = loss > middle + SIGMAS * spread and loss > TIMES * middle
            self._judge(
                "loss spike", leaps,
                f"step {step}: loss {loss:.4g}, the median of the {len(self._losses)} lines before is {middle:.4g}",
            )  # fmt: skip
            if leaps:
                return  # a leap must not make the next one look usual
        self._losses.append(loss)

    def close(self) -> None:
        """The run is over."""
        self._closed.set()
        self._thread.join()

    def _judge(self, title: str, bad: bool, text: str) -> None:
        if bad and title not in self._told:
            self._tell(title, text)
        (self._told.add if bad else self._told.discard)(title)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._least / 4, 10.0)):
            quiet = time.monotonic() - self._last
            limit = max(self._least, STALL_INTERVALS * self._longest)
            self._judge("stall", quiet > limit, f"no log line for {quiet:.0f} s; before, {self._longest:.0f} s at most")
