"""What train.sample leaves: a grid, the single images, and a record of how they were made."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from train.monitor.plots import plot_grid

# Images in grid.png, at most.
GRID = 256


def write_samples(
    folder: Path, images: np.ndarray, captions: list[str], seeds: list[int], title: str, record: dict,
    strips: bool = False,
) -> None:  # fmt: skip
    """Write grid.png, NNN-seed-SEED.png for each image (NNN: number of its prompt) and sample.json.

    images: [P x n, 3, H, W] uint8, of which the first n are of the first caption.
    record: what sample.json says beside the list of images.
    strips: the captions lie on a way, which each row of the grid goes with one seed.
    """
    n = len(images) // len(captions)
    of_each = [caption for caption in captions for _ in range(n)]
    names = [f"{i // n:03d}-seed-{seed}.png" for i, seed in enumerate(seeds)]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / name)
    order, columns = np.arange(len(images)), n if 1 < n <= 8 else 8
    if strips:
        order, columns = order.reshape(-1, n).T.ravel(), len(captions)
    order = order[:GRID]
    plot_grid(images[order], [of_each[i] for i in order], title, folder / "grid.png", columns)
    listed = [
        {"file": name, "caption": caption, "seed": seed}
        for name, caption, seed in zip(names, of_each, seeds, strict=True)
    ]
    text = json.dumps(record | {"images": listed}, indent=1, ensure_ascii=False) + "\n"
    (folder / "sample.json").write_text(text, encoding="utf-8")


def next_folder(parent: Path) -> Path:
    """The first of parent/0001, parent/0002, ... after the last one that exists."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / f"{max(taken, default=0) + 1:04d}"
