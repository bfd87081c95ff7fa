"""A list of the samples that could not be used, short enough to be read and never in the way of the run."""

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

LONGEST_NAME = 300


class Quarantine:
    """Appends to run_dir/quarantine/rank_NNNNN.jsonl, one line a sample: step, sample, reason.

    limit: lines in the file at most, those of earlier starts included; what comes after is told by the counts alone.
    A file that can't be written is told in the log once, and then let be: the run needs the counts, not the list.
    """

    def __init__(self, run_dir: Path, rank: int, limit: int = 1000) -> None:
        self.path, self.limit = run_dir / "quarantine" / f"rank_{rank:05d}.jsonl", limit
        self._room: int | None = None  # not known before the first bad sample, so that a good run touches no disk

    def add(self, step: int, bad: list[tuple[str, str]]) -> None:
        """List the (sample, reason) pairs of a micro batch."""
        if not bad or self._room == 0:
            return
        try:
            if self._room is None:
                self._room = max(self.limit - self._lines(), 0)
            listed = bad[: self._room]
            self._append(step, listed)
            self._room -= len(listed)
            if listed and not self._room:
                logger.warning("%s has its %d lines: bad samples are only counted from here on", self.path, self.limit)
        except OSError as error:
            logger.warning("bad samples are only counted from here on: %s cannot be written (%s)", self.path, error)
            self._room = 0

    def _lines(self) -> int:
        """Lines that are there already; one that was torn off by a crash is taken away."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        there = self.path.read_bytes()
        whole = there.rfind(b"\n") + 1
        if whole < len(there):
            os.truncate(self.path, whole)
        return there.count(b"\n")

    def _append(self, step: int, bad: list[tuple[str, str]]) -> None:
        lines = [json.dumps({"step": step, "sample": name[:LONGEST_NAME], "reason": reason}) for name, reason in bad]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
