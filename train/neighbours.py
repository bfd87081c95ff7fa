"""Has the net memorized pictures? `python -m train.neighbours images=evals/mine/guidance-4 shards=DIR`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.checks import check_at_least
from data.cli import command, location

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Neighbours:
    """Plots pictures that a net drew beside the training pictures nearest to them, by features of EfficientNet-Lite0.

    images: a guidance-SCALE folder of train.evaluate, or a folder of .png as train.sample writes
    shards: the training pictures
    out: the plot to write; IMAGES-neighbours.png, beside the folder of the images, if left out
    of: compare with this many training pictures, chosen at random; 0 for all
    shown: rows of the plot, one for each image
    nearest: training pictures beside each image
    """

    images: str = location()
    shards: str = location()
    out: str = location("")
    of: int = 0
    shown: int = 8
    nearest: int = 4


def neighbours(args: Neighbours) -> "tuple[np.ndarray, np.ndarray]":
    """Write the plot; returns the distances of each image to its nearest training pictures, [N, nearest], and of each
    training picture to the nearest other one, [M].

    Raises: ValueError for what cannot be compared; OSError if the plot cannot be written.
    """
    for name, least in (("of", 0), ("shown", 1), ("nearest", 1)):
        check_at_least(name, getattr(args, name), least)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    import numpy as np

    from data.device import default_device
    from data.storage.shards import find_shards
    from train.evaluation.eval_set import Pictures
    from train.evaluation.features import load_extractor
    from train.evaluation.nearest import image_features, nearest, plot_neighbours, read_images, training_features

    images = read_images(Path(args.images))
    folder = Path(args.images).absolute()
    out = Path(args.out) if args.out else folder.with_name(f"{folder.name}-neighbours.png")
    shards = find_shards(args.shards)
    training = Pictures(shards, args.of or sum(shard.count for shard in shards), seed=0)
    if args.nearest >= training.samples:
        raise ValueError(f"nearest={args.nearest} must be less than the {training.samples} training pictures")
    extract = load_extractor("lite0", "", default_device())
    of_training = training_features(extract, training, images.shape[-1])
    indices, distances = nearest(image_features(extract, images), of_training, args.nearest)
    within = nearest(of_training, of_training, 2)[1][:, 1]  # each picture's nearest is itself
    title = f"{args.images}, the first of each row, and the training pictures nearest to it"
    plot_neighbours(out, title, images[: args.shown], training, indices, distances)
    print(
        f"{out}: {len(images)} images and {training.samples:,} training pictures; distance to the nearest, "
        f"median: {np.median(distances[:, 0]):.2f} (a training picture to the nearest other one: "
        f"{np.median(within):.2f}); {np.mean(distances[:, 0] < np.quantile(within, 0.05)):.0%} of the images are "
        "nearer to one than 95 % of the training pictures are to each other"
    )
    return distances, within


def main(argv: list[str] | None = None) -> None:
    command(neighbours, Neighbours, argv)


if __name__ == "__main__":
    main()
