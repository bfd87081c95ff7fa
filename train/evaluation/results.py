"""The folder of an evaluation: what its pictures depend on, and the scores in a file, a plot and in print."""

import json
from pathlib import Path

from data.storage.tars import write_json
from train.evaluation.chunked_array import ChunkedArray
from train.monitor.plots import plot_grid, plot_scores

SETTINGS, SCORES = "evaluation.json", "scores.json"
# Pictures in a grid.
SHOWN = 16


def check_same(folder: Path, settings: dict) -> None:
    """Raises: ValueError if the folder holds an evaluation with other settings."""
    path = folder / SETTINGS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    changed = [
        f"{name}={stored.get(name)} (now {value})" for name, value in settings.items() if stored.get(name) != value
    ]
    if changed:
        raise ValueError(f"'{folder}' holds another evaluation, of {', '.join(changed)}: choose another out=")


def write_settings(folder: Path, settings: dict) -> None:
    """Write what the pictures depend on, so that a rerun with other settings is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def write_results(
    folder: Path, title: str, arguments: dict, lines: list[dict[str, float]], drawn: dict[float, ChunkedArray],
    captions: list[str],
) -> None:  # fmt: skip
    """Write scores.json, scores.png and a grid of pictures for each guidance scale, and print the scores.

    lines: the scores at each guidance scale.  drawn: the pictures at each.  captions: of the first pictures or of all.
    """
    write_json(folder / SCORES, {"of": title, "arguments": arguments, "scores": lines})
    plot_scores(lines, title, folder / "scores.png")
    for scale, images in drawn.items():
        shown = min(SHOWN, images.n)
        plot_grid(images.read(0, shown), captions[:shown], f"{title}, guidance {scale:g}", images.folder / "grid.png")
    print(title)
    for line in lines:
        print("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
    print(f"{folder / SCORES}, {folder / 'scores.png'}")
