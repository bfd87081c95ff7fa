"""A list of the samples that could not be used; it is short, and a failure to write it does not stop the run."""

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_NAME_LENGTH = 300


class Quarantine:
    """Appends to run_dir/quarantine/rank_NNNNN.jsonl, one line a sample: step, sample, reason.

    limit: most lines in the file, those of earlier starts included; further samples are only counted in the metrics.
    If the file cannot be written, one warning says so and the list ends: a run needs the counts, not the list.
    """

    def __init__(self, run_dir: Path, rank: int, limit: int = 1000) -> None:
        self.path, self.limit = run_dir / "quarantine" / f"rank_{rank:05d}.jsonl", limit
        self._lines_left: int | None = None  # unknown before the first bad sample: a run without any reads no disk

    def add(self, step: int, bad: list[tuple[str, str]]) -> None:
        """List the (sample, reason) pairs of a micro batch."""
        if not bad or self._lines_left == 0:
            return
        try:
            if self._lines_left is None:
                self._lines_left = max(self.limit - self._count_lines(), 0)
            listed = bad[: self._lines_left]
            self._append(step, listed)
            self._lines_left -= len(listed)
            if listed and not self._lines_left:
                logger.warning("%s has its %d lines: bad samples are only counted from here on", self.path, self.limit)
        except OSError as error:
            logger.warning("bad samples are only counted from here on: %s cannot be written (%s)", self.path, error)
            self._lines_left = 0

    def _count_lines(self) -> int:
        """Whole lines in the file; an incomplete last line, left by a crash, is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.path, end)
        return content.count(b"\n")

    def _append(self, step: int, bad: list[tuple[str, str]]) -> None:
        lines = [json.dumps({"step": step, "sample": name[:MAX_NAME_LENGTH], "reason": why}) for name, why in bad]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
