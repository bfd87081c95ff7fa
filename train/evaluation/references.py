"""Features of the reference pictures: made once, kept in a file, checked when read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from train.evaluation.chunked_array import ChunkedArray, Work
from train.evaluation.eval_set import EvalSet
from train.evaluation.features import Extractor


def find_references(
    out: Path, file: str, extract: Extractor, eval_set: EvalSet, image_size: int, work: Work
) -> np.ndarray:
    """Features of the captions' own pictures [N, dim], from the file that was named or made here; a collective call."""
    if file:
        return read_references(file, extract, eval_set, image_size)
    own = ChunkedArray(out / "references", extract.name, eval_set.samples)
    pictures = partial(eval_set.pictures, image_size=image_size)
    work.fill(own, partial(_features, extract, pictures), f"references, {extract.name}")
    features = own.read()
    if work.rank == 0:
        path = out / f"references-{extract.name}.npz"
        write_references(path, features, extract.name, eval_set, image_size)
    return features


def _features(extract: Extractor, pictures: Callable[[int, int], np.ndarray], first: int, stop: int) -> np.ndarray:
    return extract(torch.from_numpy(pictures(first, stop)))


def write_references(path: Path, values: np.ndarray, name: str, eval_set: EvalSet, image_size: int) -> None:
    """Features of the references, and what they are of, for a later evaluation; aside and renamed."""
    aside = path.with_suffix(".part")
    with open(aside, "wb") as file:
        np.savez(file, features=values, extractor=name, image_size=image_size, captions=eval_set.digest)
    aside.replace(path)


def read_references(path: str, extract: Extractor, eval_set: EvalSet, image_size: int) -> np.ndarray:
    """Raises: ValueError if they are of other pictures, of another size or count, or of another extractor."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features, name = file["features"], str(file["extractor"])
            size, digest = int(file["image_size"]), str(file["captions"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"references={path} cannot be read ({error}): give a file that an evaluation wrote") from None
    for what, there, now in (
        ("features", f"{name} ({features.shape[-1]})", f"{extract.name} ({extract.dim})"),
        ("pixels", size, image_size),
        ("pictures", len(features), eval_set.samples),
        ("captions and draw", digest[:8], eval_set.digest[:8]),
    ):
        if there != now:
            raise ValueError(
                f"references={path} are of other {what}: {there}, this evaluation has {now}; leave references= out, "
                "and they are made anew"
            )
    return features
