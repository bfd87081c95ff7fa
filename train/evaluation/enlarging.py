"""Evaluations of the second stage: what its nets enlarge, what interpolation makes of that, and pixels compared."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.images import resize
from model.super_resolution import enlarge
from train.evaluation.chunked_array import ArrayFiller, ChunkedArray
from train.evaluation.drawing import Drawing, Pieces, find_drawings
from train.evaluation.eval_set import EvalSet
from train.evaluation.manifest import MANIFEST, read_manifest
from train.evaluation.scores import OF_PAIRS, psnr
from train.monitor.plots import plot_grid
from train.sampling.sampler import to_pixels

# Of the picture of examples.
COLUMNS = 8


def find_low_res(folder: str, eval_set: EvalSet, size: int) -> Pieces:
    """The small images: the captions' own pictures, or what an evaluation of the first stage drew.

    folder: of that, guidance-SCALE; '' for none.  size: in pixels.
    Raises: ValueError if there are not as many, or they have another size.
    """
    if not folder:
        return partial(eval_set.pictures, image_size=size)
    n, at = eval_set.samples, Path(folder)
    if not (at.parent / MANIFEST).is_file() or not at.is_dir():
        raise ValueError(f"low_res={folder}: no pictures of an evaluation: name a guidance-SCALE folder of one")
    if (there := read_manifest(at.parent)["drawing"]["samples"]) != n:
        raise ValueError(f"low_res={folder} holds {there} pictures, and samples={n}: give samples={there}")
    drawn = ChunkedArray(at, "images", n)
    if missing := sum(stop - first for first, stop in drawn.missing(n)):
        raise ValueError(f"low_res={folder}: {missing} of {n} pictures are not drawn yet: finish that evaluation")
    if (found := drawn.read(0, 1).shape[-1]) != size:
        raise ValueError(f"low_res={folder}: the pictures have {found} px, and the net enlarges {size} px")
    return drawn.read


def enlarge_without_net(out: Path, low_res: Pieces, size: int, samples: int, filler: ArrayFiller) -> list[Drawing]:
    """Drawings by interpolation: Pillow's BICUBIC, and the bilinear one that a net is given; a collective call."""
    makers: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"bicubic": resized, "bilinear": _bilinear}
    drawings = find_drawings(out, samples, [{"enlarged_by": name} for name in makers])
    for one, maker in zip(drawings, makers.values(), strict=True):

        def make(first: int, stop: int, maker: Callable[[np.ndarray, int], np.ndarray] = maker) -> np.ndarray:
            return maker(low_res(first, stop), size)

        filler.fill(one.images, make, one.name)
    return drawings


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """The images in another size, as the training resizes pictures: uint8 [N, 3, h, w] -> [N, 3, size, size]."""
    return np.stack([resize(Image.fromarray(image.transpose(1, 2, 0)), size) for image in images])


def _bilinear(images: np.ndarray, size: int) -> np.ndarray:
    return to_pixels(enlarge(torch.from_numpy(images).float() / 127.5 - 1, size)).numpy()


def score_pairs(
    scores: list[str], drawing: Drawing, true: Pieces, low_res: Pieces, size: int, filler: ArrayFiller
) -> dict[str, np.ndarray]:
    """Those of OF_PAIRS that are wanted, a number for each picture of a drawing; a collective call.

    true: the large pictures.  size: of the small images.
    """
    images = drawing.images

    def of_true(first: int, stop: int) -> np.ndarray:
        return psnr(images.read(first, stop), true(first, stop))

    def of_small(first: int, stop: int) -> np.ndarray:
        return psnr(resized(images.read(first, stop), size), low_res(first, stop))

    found = {}
    for name, make in zip(OF_PAIRS, (of_true, of_small), strict=True):
        if name in scores:
            array = ChunkedArray(images.folder, name, images.n)
            filler.fill(array, make, f"{drawing.name}, {name}")
            found[name] = array.read()
    return found


def plot_examples(
    path: Path, title: str, captions: list[str], low_res: Pieces, drawings: list[Drawing], true: Pieces
) -> None:
    """Draw some pictures in columns: the small image, a row for each drawing, and the caption's own picture."""
    shown = min(COLUMNS, drawings[0].images.n)
    large = true(0, shown)
    points = torch.from_numpy(low_res(0, shown))
    squares = torch.nn.functional.interpolate(points, large.shape[-2:], mode="nearest").numpy()
    rows = {"small image": squares} | {one.name: one.images.read(0, shown) for one in drawings}
    rows |= {"the caption's own": large}
    images, labels = np.concatenate(list(rows.values())), list(rows)
    plot_grid(images, captions[:shown] * len(rows), title, path, shown, labels)
