r"""What bad data does to a step's error and gradient norm: a table in Markdown.

python -m tests.benchmarks.bad_data checkpoint=runs/scenes/checkpoints/step-00001500 \
    shards=datasets/scenes/shards text=datasets/scenes/minilm

Batches of its data are spoiled in part, and go through the net of a checkpoint.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from data.cli import command, location
from data.loader.stream import MicroBatches
from model.diffusion import Diffusion
from model.losses import training_losses
from model.unet import UNet
from tests.support.bad_pictures import checkerboard
from train.checkpoint.checkpoint import Checkpoint
from train.compose import compose_config
from train.config import Config
from train.faults.spikes import spike_limit
from train.inputs import Inputs, find_inputs
from train.noise import DeviceBatch, DeviceBatches
from train.weights.trained_net import load_net


@dataclass
class BadData:
    """Measures what bad data does to a step's error and gradient norm.

    checkpoint: of a training at 16 px.
    shards, text: its data.
    batch: samples of a step.
    usual: batches by which the limits of a spike are known.
    spoiled: batches of which samples are spoiled, one after another.
    """

    checkpoint: str = location()
    shards: str = location()
    text: str = location()
    batch: int = 16
    usual: int = 14
    spoiled: int = 3


def noise(pictures: Tensor) -> Tensor:
    """In [-1, 1], each value at random."""
    return torch.rand(pictures.shape) * 2 - 1


def one_channel(states: Tensor) -> Tensor:
    """Of text states: 10,000 in one channel."""
    states = states.clone()
    states[..., 5] = 1e4
    return states


PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pictures of noise, each value at random": noise,
    "pictures of noise, each value 0 or 255": lambda pictures: noise(pictures).sign(),
    "pictures in which each pixel is black beside white": lambda pictures: (
        torch.from_numpy(checkerboard(pictures.shape[-1])).permute(2, 0, 1).expand(pictures.shape) / 127.5 - 1
    ),
    "white pictures": torch.ones_like,
}
TEXT: dict[str, Callable[[Tensor], Tensor]] = {
    "text states 100 times too large": lambda states: states * 100,
    "text states of other samples": lambda states: states.roll(1, 0),
    "text states with one channel of 10,000": one_channel,
}


def batches_of(config: Config, inputs: Inputs, step: int) -> DeviceBatches:
    """Those of the steps after this one."""
    size = config.global_batch
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, image_size=config.model.image_size, seed=config.seed,
        global_batch=size, micro_batch=size, step=step,
    )  # fmt: skip
    loaded = (batch.copy(False) for batch in stream.fill(step, 1, [stream.new_buffer()]))
    return DeviceBatches(loaded, config.seed, Diffusion(config.diffusion_steps), torch.device("cpu"))


def mse_and_norm(
    net: UNet, diffusion: Diffusion, batch: DeviceBatch, x_start: Tensor, text_emb: Tensor
) -> tuple[float, float]:
    """The step's mean mse, and the norm of its gradient."""
    x_t = diffusion.q_sample(x_start, batch.t, batch.noise)
    losses = training_losses(diffusion, net(x_t, batch.t, text_emb), x_start, x_t, batch.t, batch.noise)
    gradient = torch.autograd.grad(losses["loss"].mean(), list(net.parameters()))
    return float(losses["mse"].mean()), float(torch.stack([part.norm() for part in gradient]).norm())


def measure(args: BadData) -> None:
    """Print the limits and the table."""
    torch.manual_seed(0)
    checkpoint = Checkpoint.open(args.checkpoint)
    own = {"data.shards": args.shards, "data.text": args.text, "global_batch": args.batch, "micro_batch": args.batch}
    config = compose_config(["+experiment=smoke", *(f"{name}={value}" for name, value in own.items())])
    net = load_net(checkpoint, "ema", torch.device("cpu")).float().requires_grad_(True)
    inputs, diffusion = find_inputs(config), Diffusion(checkpoint.diffusion_steps)
    inputs.to(torch.device("cpu"))
    batches = list(islice(batches_of(config, inputs, checkpoint.step), args.usual))
    usual = [mse_and_norm(net, diffusion, batch, batch.x_start, inputs.text_emb(batch.text_emb)) for batch in batches]
    for name, values in zip(("mse", "norm"), map(list, zip(*usual, strict=True)), strict=True):
        limit = spike_limit(values, config.spike_factor)
        print(f"{name}: median {statistics.median(values):.3f}, limit {limit:.3f}")
    size = config.global_batch
    print(f"\n| what is bad | in 1 of {size}: mse, norm | in {size // 4} of {size} | in all |\n|---|---:|---:|---:|")
    for what, spoil in (PICTURES | TEXT).items():
        cells = []
        for number in (1, size // 4, size):
            found = []
            for batch in batches[: args.spoiled]:
                x_start, text_emb = batch.x_start.clone(), inputs.text_emb(batch.text_emb).clone()
                spoiled = x_start if what in PICTURES else text_emb
                spoiled[:number] = spoil(spoiled)[:number]
                found.append(mse_and_norm(net, diffusion, batch, x_start, text_emb))
            cells.append(", ".join(f"{statistics.mean(values):.2f}" for values in zip(*found, strict=True)))
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, BadData, argv)


if __name__ == "__main__":
    main()
