"""Reads what a run has logged: its metrics, its starts, its sample grids."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from train.checkpoint.changes import find_changes

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"


@dataclass(slots=True)
class RunPart:
    """Steps of a run with one recipe: the configuration and the number of ranks.

    changes: from the part before, by key the values before and now.
    """

    first_step: int
    recipe: dict
    changes: dict[str, list] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """What the folder of a run holds.

    lines: of metrics.jsonl, by rising step.  starts: of starts.jsonl.  grids: step and PNG of each sample grid.
    warnings: what could not be read.
    """

    name: str
    lines: list[dict]
    starts: list[dict]
    grids: list[tuple[int, Path]]
    warnings: list[str]

    @property
    def parts(self) -> list[RunPart]:
        """The recipes that the steps of the run were made with, by rising step.

        A start that went on from a step before that of an earlier start made the earlier one's steps again.
        """
        kept: list[dict] = []
        for start in self.starts:
            if isinstance(start.get("config"), dict) and isinstance(start.get("step"), int):
                kept = [*(before for before in kept if before["step"] < start["step"]), start]
        parts: list[RunPart] = []
        for start in kept:
            recipe = start["config"] | {"ranks": start.get("ranks")}
            changes = find_changes(parts[-1].recipe, recipe) if parts else {}
            parts.append(RunPart(start["step"] + 1, recipe, changes))
        return parts


def read_run(folder: Path) -> Run:
    """Read the folder of a run; of a step that is logged twice the later line counts.

    Raises: ValueError if it is not the folder of a run, or the run has logged nothing yet.
    """
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(
            f"'{folder.absolute()}' is not the folder of a run (no {METRICS}): name one that train/main.py wrote"
        )
    (lines, broken), (starts, broken_starts) = read_lines(path), read_lines(folder / STARTS)
    by_step = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    if not by_step:
        raise ValueError(f"'{path}' has no line that can be read: the run has logged nothing yet")
    warnings = [
        f"{file}: {lines_broken} lines cannot be read and are left out; a crash may cut off the last one"
        for file, lines_broken in ((path, broken), (folder / STARTS, broken_starts))
        if lines_broken
    ]
    kept = [by_step[step] for step in sorted(by_step)]
    return Run(folder.resolve().name, kept, starts, sample_grids(folder), warnings)


def sample_grids(folder: Path) -> list[tuple[int, Path]]:
    """Step and PNG of each sample grid of a run, by rising step."""
    names = {file: file.stem.removeprefix("step-") for file in sorted((folder / "samples").glob("step-*.png"))}
    return [(int(step), file) for file, step in names.items() if step.isdecimal()]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl that have a step; a line that a crash cut off is left out."""
    return [line for line in read_lines(path)[0] if isinstance(line.get("step"), int)]


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a .jsonl file, and how many of its lines are none; a missing file counts as empty."""
    lines, broken = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            broken += bool(text.strip())
    return lines, broken
