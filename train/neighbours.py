"""Has the net learned by heart? `python -m train.neighbours images=evals/mine/guidance-4 shards=DIR out=FILE.png`.

Shows pictures that a net drew beside the training pictures nearest to them, by features of EfficientNet-Lite0.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm

from data.cli import command
from data.storage.shards import find_shards
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import Pictures
from train.evaluation.features import Extractor, load_extractor
from train.monitor.plots import plot_grid

BATCH = 64


@dataclass
class Neighbours:
    """images: a guidance-SCALE folder of train.evaluate, or a folder of .png, as train.sample writes.

    shards: the pictures of the training. of: so many of them, drawn at random; 0 takes all. shown: rows of the picture.
    nearest: training pictures beside each.
    """

    images: str = MISSING
    shards: str = MISSING
    out: str = "neighbours.png"
    of: int = 0
    shown: int = 8
    nearest: int = 4


def neighbours(args: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Draw args.out; returns the distances of each image to its nearest training pictures, [N, nearest], and of each
    training picture to the nearest other one, [M].

    Raises: ValueError for what cannot be compared; OSError if it cannot be written.
    """
    images = read_images(Path(args.images))
    shards = find_shards(args.shards)
    training = Pictures(shards, args.of or sum(shard.count for shard in shards), seed=0)
    if not 1 <= args.nearest < training.samples or args.shown < 1:
        raise ValueError(
            f"nearest={args.nearest} must lie between 1 and {training.samples} - 1 training pictures, and "
            f"shown={args.shown} be at least 1"
        )
    extract = load_extractor("lite0", "", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    of_images = np.concatenate([extract(torch.from_numpy(images[i : i + BATCH])) for i in range(0, len(images), BATCH)])
    of_training = training_features(extract, training, images.shape[-1])
    order, found = nearest(of_images, of_training, args.nearest)
    within = nearest(of_training, of_training, 2)[1][:, 1]  # the nearest of all is itself
    show(args, images, training, order, found)
    print(
        f"{args.out}: {len(images)} images and {training.samples:,} training pictures; distance to the nearest, "
        f"median: {np.median(found[:, 0]):.2f} (a training picture to the nearest other one: {np.median(within):.2f}); "
        f"{np.mean(found[:, 0] < np.quantile(within, 0.05)):.0%} of the images are nearer to one than 95 % of the "
        "training pictures are to each other"
    )
    return found, within


def read_images(folder: Path) -> np.ndarray:
    """uint8 [N, 3, H, W].  Raises: ValueError if there are none, or of different sizes."""
    pieces = sorted(folder.glob("*.images.npy"))
    if pieces:
        return ChunkedArray(folder, "images", int(pieces[-1].name.split(".")[0].split("-")[1])).read()
    found = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png")) if path.stem != "grid"
    ]
    sizes = {image.shape[:2] for image in found}
    if len(sizes) != 1 or sizes != {next(iter(sizes))[:1] * 2}:
        raise ValueError(
            f"images={folder} holds {len(found)} pictures of {len(sizes)} sizes: give a folder that train.evaluate "
            "(guidance-SCALE) or train.sample wrote"
        )
    return np.stack(found).transpose(0, 3, 1, 2)


def training_features(extract: Extractor, training: Pictures, image_size: int) -> np.ndarray:
    """[M, dim], of the pictures as the net saw them but for the shift of the crop."""
    made = []
    with tqdm(total=training.samples, desc="training pictures", unit="image") as bar:
        for first in range(0, training.samples, BATCH):
            stop = min(first + BATCH, training.samples)
            made.append(extract(torch.from_numpy(training.pictures(first, stop, image_size))))
            bar.update(stop - first)
    return np.concatenate(made)


def nearest(a: np.ndarray, b: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a the `count` nearest rows of b: their numbers and Euclidean distances, [N, count] both."""
    numbers, found = [], []
    for part in torch.from_numpy(a).split(1024):
        values, index = torch.cdist(part, torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist").topk(
            count, largest=False
        )
        numbers.append(index.numpy())
        found.append(values.numpy())
    return np.concatenate(numbers), np.concatenate(found)


def show(args: Neighbours, images: np.ndarray, training: Pictures, order: np.ndarray, found: np.ndarray) -> None:
    """A row for each image: itself, then its neighbours from the nearest on, with their captions and distances."""
    shown = min(args.shown, len(images))
    cells, told = [], []
    for i in range(shown):
        cells.append(images[i])
        told.append(f"image {i}")
        for number, distance in zip(order[i].tolist(), found[i].tolist(), strict=True):
            cells.append(training.pictures(number, number + 1, images.shape[-1])[0])
            told.append(f"{training.captions(number, number + 1)[0]} ({distance:.1f})")
    title = f"{args.images}, the first of each row, and the training pictures nearest to it"
    plot_grid(np.stack(cells), told, title, Path(args.out), args.nearest + 1)


def main(argv: list[str] | None = None) -> None:
    command(neighbours, Neighbours, argv)


if __name__ == "__main__":
    main()
