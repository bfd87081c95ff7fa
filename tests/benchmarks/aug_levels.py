"""Does the validation loss of a second stage depend on how much its small images are noised? A table in Markdown.

python -m tests.benchmarks.aug_levels checkpoint=runs/scenes_ii shards=datasets/held_out/shards \
    text=datasets/held_out/minilm
The losses are those of the training's validation, which has the level 0.25, here at several levels.
"""

from dataclasses import dataclass, field

from data.cli import command, location
from data.config import DataConfig
from data.loader.dataset import Dataset
from data.loader.held_out import HeldOut
from data.storage.shards import find_shards
from data.text.meta import TextMeta
from model.diffusion import Diffusion
from train.checkpoint.checkpoint import Checkpoint
from train.engine import init_distributed
from train.evaluation.validation import TIMESTEPS, timesteps, validation_losses
from train.weights.trained_net import load_net


@dataclass
class AugLevels:
    """Computes the validation loss of the averaged weights at several levels.

    checkpoint: the folder of a run of the second stage, or of one of its steps.
    shards: captioned pictures.
    text: the embeddings of their captions.
    samples: pictures, taken evenly from all.
    levels: shares of the timesteps.
    """

    checkpoint: str = location()
    shards: str = location()
    text: str = location()
    samples: int = 48
    levels: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75])


def measure(args: AugLevels) -> None:
    """Print the table.  Raises: ValueError for a net of the first stage."""
    checkpoint = Checkpoint.open(args.checkpoint)
    net = checkpoint.model
    if not net.low_res_size:
        raise ValueError(f"'{checkpoint.folder}' is of the first stage, which has no small images")
    _, _, device = init_distributed()
    samples = HeldOut(
        DataConfig(), [Dataset(find_shards(args.shards), args.text)], TextMeta.read(args.text),
        image_size=net.image_size, samples=args.samples, micro_batch=16, low_res_size=net.low_res_size,
    )  # fmt: skip
    unet, diffusion = load_net(checkpoint, "ema", device), Diffusion(checkpoint.diffusion_steps).to(device)
    print(f"step {checkpoint.step}, {samples.samples} samples")
    of_t = [f"t = {t}" for t in timesteps(diffusion.timesteps)]
    print(f"| level | mse_mean | mse | {' | '.join(of_t)} |\n|---|{'---:|' * (TIMESTEPS + 2)}")
    for level in args.levels:
        values = validation_losses(unet, diffusion, samples, lambda text: text.float(), device, aug_level=level)
        cells = [values[f"validation/{name}"] for name in ("mse_mean", "mse", *(f"mse_e{i}" for i in range(TIMESTEPS)))]
        print(f"| {level:g} | {' | '.join(f'{value:.5f}' for value in cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, AugLevels, argv)


if __name__ == "__main__":
    main()
