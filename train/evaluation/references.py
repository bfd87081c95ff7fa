"""Features of the reference pictures: computed once, kept in a file, checked when read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.storage.atomic import atomic_file
from train.evaluation.chunked_array import ArrayFiller, ChunkedArray
from train.evaluation.eval_set import EvalSet
from train.evaluation.features import Extractor
from train.evaluation.manifest import SHORT


def find_references(
    out: Path, file: str, extract: Extractor, eval_set: EvalSet, image_size: int, filler: ArrayFiller, manifest: dict
) -> np.ndarray:
    """Features of the captions' own pictures, [N, dim]: from a file, or computed here; a collective call.

    file: that an earlier evaluation wrote, '' for none.  manifest: of the evaluation, whose references are taken.
    Raises: ValueError, as read_references.
    """
    if file:
        return read_references(file, extract, eval_set.samples, manifest["references"], image_size)
    array = ChunkedArray(out / "references", extract.name, eval_set.samples)
    pictures = partial(eval_set.pictures, image_size=image_size)
    filler.fill(array, partial(extract_features, extract, pictures), f"references, {extract.name}")
    features = array.read()
    if filler.rank == 0:
        path = out / f"references-{extract.name}.npz"
        write_references(path, features, extract, manifest["references"], image_size)
    return features


def extract_features(
    extract: Extractor, pictures: Callable[[int, int], np.ndarray], first: int, stop: int
) -> np.ndarray:
    """Features of the pictures from first to stop, [stop - first, dim].

    pictures: (first, stop) -> uint8 [stop - first, 3, H, W].
    """
    return extract(torch.from_numpy(pictures(first, stop)))


def write_references(path: Path, values: np.ndarray, extract: Extractor, pictures: str, image_size: int) -> None:
    """Write features of references for later evaluations, with the extractor, and the size and hash of the pictures."""
    with atomic_file(path) as aside, open(aside, "wb") as file:
        np.savez(
            file, features=values, extractor=extract.name, weights=extract.digest, image_size=image_size,
            pictures=pictures,
        )  # fmt: skip


def read_references(path: str, extract: Extractor, samples: int, pictures: str, image_size: int) -> np.ndarray:
    """Features of references from a file, [N, dim].  pictures: the hash of them.

    Raises: ValueError if they are of other pictures, of another size or number, or of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            features, name, weights = file["features"], str(file["extractor"]), str(file["weights"])
            size, digest = int(file["image_size"]), str(file["pictures"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"references={path} cannot be read ({error}): give a file that an evaluation wrote") from None
    for what, stored, now in (
        ("features", f"{name} ({features.shape[-1]})", f"{extract.name} ({extract.dim})"),
        ("pixels", size, image_size),
        ("weights", weights[:SHORT], extract.digest[:SHORT]),
        ("numbers of pictures", len(features), samples),
        ("pictures", digest[:SHORT], pictures[:SHORT]),
    ):
        if stored != now:
            raise ValueError(
                f"references={path} are of other {what}: {stored}, this evaluation has {now}; leave references= out "
                "to compute them again"
            )
    return features
