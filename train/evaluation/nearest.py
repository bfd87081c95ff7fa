"""Pictures that a net drew beside the training pictures nearest to them. The command is train.neighbours."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.progress import Progress
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import Pictures
from train.evaluation.features import Extractor
from train.monitor.plots import plot_grid

BATCH = 64
# What train.sample writes beside the images.
SHEETS = ("grid", "steps", "second_steps")


def read_images(folder: Path) -> np.ndarray:
    """The images of a guidance-SCALE folder of train.evaluate or a folder of .png, uint8 [N, 3, H, W].

    Raises: ValueError if there are none, or they have different sizes.
    """
    pieces = sorted(folder.glob("*.images.npy"))
    if pieces:
        return ChunkedArray(folder, "images", int(pieces[-1].name.split(".")[0].split("-")[1])).read()
    images = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png")) if path.stem not in SHEETS
    ]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) != 1 or sizes != {next(iter(sizes))[:1] * 2}:
        raise ValueError(
            f"images={folder.absolute()} holds {len(images)} pictures of {len(sizes)} sizes: give a folder that "
            "train.evaluate (guidance-SCALE) or train.sample wrote"
        )
    return np.stack(images).transpose(0, 3, 1, 2)


def image_features(extract: Extractor, images: np.ndarray) -> np.ndarray:
    """Features of images, uint8 [N, 3, H, W] -> [N, dim]."""
    with Progress("features of the images", len(images), "picture") as progress:
        features = []
        for first in range(0, len(images), BATCH):
            features.append(extract(torch.from_numpy(images[first : first + BATCH])))
            progress.update(len(features[-1]))
    return np.concatenate(features)


def training_features(extract: Extractor, training: Pictures, image_size: int) -> np.ndarray:
    """Features of the training pictures, preprocessed as in training, but with a central crop; [M, dim]."""
    features = []
    with Progress("features of the training pictures", training.samples, "picture") as progress:
        for first in range(0, training.samples, BATCH):
            stop = min(first + BATCH, training.samples)
            features.append(extract(torch.from_numpy(training.pictures(first, stop, image_size))))
            progress.update(stop - first)
    return np.concatenate(features)


def nearest(a: np.ndarray, b: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a, the indices of the `count` nearest rows of b and their Euclidean distances.

    Shapes: a [N, D], b [M, D]; both results [N, count], nearest first.
    """
    indices, distances = [], []
    for part in torch.from_numpy(a).split(1024):
        values, index = torch.cdist(part, torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist").topk(
            count, largest=False
        )
        indices.append(index.numpy())
        distances.append(values.numpy())
    return np.concatenate(indices), np.concatenate(distances)


def plot_neighbours(
    path: Path, title: str, images: np.ndarray, training: Pictures, indices: np.ndarray, distances: np.ndarray
) -> None:
    """Plot a row for each image: itself, then its neighbours, nearest first, with their captions and distances."""
    cells, labels = [], []
    for i, image in enumerate(images):
        cells.append(image)
        labels.append(f"image {i}")
        for number, distance in zip(indices[i].tolist(), distances[i].tolist(), strict=True):
            cells.append(training.pictures(number, number + 1, image.shape[-1])[0])
            labels.append(f"{training.captions(number, number + 1)[0]} ({distance:.1f})")
    plot_grid(np.stack(cells), labels, title, path, indices.shape[1] + 1)
