"""The scores of an evaluation, in a file, a plot and in print."""

from pathlib import Path

from data.storage.tars import write_json
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.manifest import name_of
from train.monitor.plots import plot_grid, plot_lengths, plot_scores

SCORES, LENGTHS = "scores.json", "lengths.json"
# Pictures in a grid.
SHOWN = 16


def write_results(
    folder: Path, title: str, arguments: dict, manifest: dict, lines: list[dict[str, float]],
    drawn: dict[float, ChunkedArray], captions: list[str],
) -> None:  # fmt: skip
    """Write scores.json, scores.png and a grid of pictures for each guidance scale, and print the scores.

    Each line names its manifest.
    lines: the scores at each guidance scale.  drawn: the pictures at each.  captions: of the first pictures or of all.
    """
    names = [name_of(manifest, line["guidance_scale"]) for line in lines]
    named = [{"manifest": name} | line for name, line in zip(names, lines, strict=True)]
    write_json(folder / SCORES, {"of": title, "arguments": arguments, "manifest": manifest, "scores": named})
    plot_scores(lines, title, folder / "scores.png")
    for scale, images in drawn.items():
        shown = min(SHOWN, images.n)
        plot_grid(images.read(0, shown), captions[:shown], f"{title}, guidance {scale:g}", images.folder / "grid.png")
    print(title)
    for name, line in zip(names, lines, strict=True):
        print("  ".join(f"{score} {value:.5g}" for score, value in line.items()), f" manifest {name}")
    print(f"{folder / SCORES}, {folder / 'scores.png'}")


def write_lengths(folder: Path, checkpoint: Path, step: int, lines: list[dict[str, float]]) -> None:
    """Write lengths.json and lengths.png, the scores against the length of the average, and print them.

    checkpoint, step: of which all are.  lines: the scores at each length and guidance scale.
    """
    write_json(folder / LENGTHS, {"checkpoint": str(checkpoint), "step": step, "scores": lines})
    plot_lengths(lines, folder / "lengths.png")
    for line in lines:
        print("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
    print(f"{folder / LENGTHS}, {folder / 'lengths.png'}")
