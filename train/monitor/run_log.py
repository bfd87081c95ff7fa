"""A run as it lies on disk: the lines of its metrics, its starts, its sample grids."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Run:
    """A run as it lies on disk.

    lines: of metrics.jsonl, steps rising.  starts: of starts.jsonl.  grids: step and PNG of each sample grid.
    warnings: what could not be read.
    """

    name: str
    lines: list[dict]
    starts: list[dict]
    grids: list[tuple[int, Path]]
    warnings: list[str]


def read_run(folder: Path) -> Run:
    """Raises: ValueError if the folder is not a run's, or it has logged nothing yet."""
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"'{folder}' is not the folder of a run (no {METRICS}): name one that train/main.py wrote")
    found, broken = read_lines(path)
    by_step = {line["step"]: line for line in found if isinstance(line.get("step"), int)}
    if not by_step:
        raise ValueError(f"'{path}' has no line that can be read: the run has logged nothing yet")
    warnings = []
    if broken:
        warnings.append(f"{path}: {broken} lines cannot be read and are left out; one cut by a crash is usual")
    starts, torn = read_lines(folder / STARTS)
    if torn:
        warnings.append(f"{folder / STARTS}: {torn} lines cannot be read and are left out")
    grids = [
        (int(file.stem.removeprefix("step-")), file)
        for file in sorted((folder / "samples").glob("step-*.png"))
        if file.stem.removeprefix("step-").isdecimal()
    ]
    return Run(folder.resolve().name, [by_step[step] for step in sorted(by_step)], starts, grids, warnings)


METRICS, STARTS = "metrics.jsonl", "starts.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; one that was cut short by a crash is left out."""
    return [line for line in read_lines(path)[0] if isinstance(line.get("step"), int)]


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a .jsonl, and how many lines hold none; no file is an empty one."""
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
