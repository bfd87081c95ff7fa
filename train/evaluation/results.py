"""The scores of an evaluation, in a file, a plot and in print."""

from pathlib import Path
from typing import Any

from data.storage.tars import write_json
from train.evaluation.drawing import Drawing
from train.evaluation.manifest import name_of
from train.monitor.plots import plot_grid, plot_lengths, plot_scores

SCORES, LENGTHS = "scores.json", "lengths.json"
# Pictures in a grid.
SHOWN = 16


def write_results(
    folder: Path, title: str, arguments: dict, manifest: dict, lines: list[dict[str, Any]], drawings: list[Drawing],
    captions: list[str],
) -> None:  # fmt: skip
    """Write scores.json, scores.png and a grid of pictures for each drawing, and print the scores.

    Each line names its manifest.
    lines: the settings and scores of each drawing.  captions: of the first pictures or of all.
    """
    names = [name_of(manifest, one.settings) for one in drawings]
    named = [{"manifest": name} | line for name, line in zip(names, lines, strict=True)]
    write_json(folder / SCORES, {"of": title, "arguments": arguments, "manifest": manifest, "scores": named})
    plot_scores(lines, title, folder / "scores.png")
    for one in drawings:
        shown, path = min(SHOWN, one.images.n), one.images.folder / "grid.png"
        plot_grid(one.images.read(0, shown), captions[:shown], f"{title}, {one.name}", path)
    print(title)
    for name, line in zip(names, lines, strict=True):
        print(_shown(line), f" manifest {name}")
    print(f"{folder / SCORES}, {folder / 'scores.png'}")


def write_lengths(folder: Path, checkpoint: Path, step: int, lines: list[dict[str, Any]]) -> None:
    """Write lengths.json and lengths.png, the scores against the length of the average, and print them.

    checkpoint, step: of which all are.  lines: the scores at each length and guidance scale.
    """
    write_json(folder / LENGTHS, {"checkpoint": str(checkpoint), "step": step, "scores": lines})
    plot_lengths(lines, folder / "lengths.png")
    for line in lines:
        print(_shown(line))
    print(f"{folder / LENGTHS}, {folder / 'lengths.png'}")


def _shown(line: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value if isinstance(value, str) else f'{value:.5g}'}" for name, value in line.items())
