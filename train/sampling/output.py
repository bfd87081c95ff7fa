"""What train.sample leaves: a grid, the single images, and a record of how they were made."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from train.monitor.plots import plot_grid

# Images in grid.png, at most, and the folder of the small ones that a second stage enlarged.
GRID, SMALL = 256, "small"


def write_samples(
    folder: Path, stages: Sequence[np.ndarray], captions: list[str], seeds: list[int], title: str, record: dict,
    strips: bool = False,
) -> None:  # fmt: skip
    """Write grid.png, NNN-seed-SEED.png for each image (NNN: number of its prompt) and sample.json.

    stages: of each stage the images [P x n, 3, H, W] uint8, of which the first n are of the first caption. Those of a
    first of two stages go into a folder of their own, under the same names, and above those of the second in the grid.
    record: what sample.json says beside the list of images.
    strips: the captions lie on a way, which each row of the grid goes with one seed.
    """
    images, n = stages[-1], len(seeds) // len(captions)
    of_each = [caption for caption in captions for _ in range(n)]
    names = [f"{i // n:03d}-seed-{seed}.png" for i, seed in enumerate(seeds)]
    for path, of_stage in zip((folder, folder / SMALL), reversed(stages), strict=False):
        path.mkdir(exist_ok=True)
        for name, image in zip(names, of_stage, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(path / name)
    order, columns = np.arange(len(images)), n if 1 < n <= 8 else min(8, len(images))
    if strips:
        order, columns = order.reshape(-1, n).T.ravel(), len(captions)
    order = order[: GRID // len(stages)]
    columns = min(columns, len(order))
    cells, below, labels = [], [], []
    for first in range(0, len(order), columns):
        row = order[first : first + columns]
        blank = [np.full((3, 1, 1), 255, np.uint8)] * (columns - len(row))
        for of_stage in stages:
            cells += [*of_stage[row], *blank]
        below += [""] * columns * (len(stages) - 1) + [of_each[i] for i in row] + [""] * len(blank)
        labels += ["first stage", "second stage"]
    plot_grid(cells, below, title, folder / "grid.png", columns, labels if len(stages) > 1 else None)
    listed = [
        {"file": name, "caption": caption, "seed": seed} | ({"small": f"{SMALL}/{name}"} if len(stages) > 1 else {})
        for name, caption, seed in zip(names, of_each, seeds, strict=True)
    ]
    text = json.dumps(record | {"images": listed}, indent=1, ensure_ascii=False) + "\n"
    (folder / "sample.json").write_text(text, encoding="utf-8")


def next_folder(parent: Path) -> Path:
    """The first of parent/0001, parent/0002, ... after the last one that exists."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / f"{max(taken, default=0) + 1:04d}"
