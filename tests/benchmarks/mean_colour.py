"""Does a net predict the mean colour? Its error at single timesteps, under a picture's own caption and under another's.

In the second stage, with a picture's own small image and with another's; the captions are its own.

python -m tests.benchmarks.mean_colour run=runs/scenes-0 at=[500,5000] shards=datasets/held_out/shards \
    text=datasets/held_out/minilm
Errors are in units of the noise at the same frequency. `by t alone` is the mean's error of the best linear guess from
the mean of x_t, which knows how much the mean colours of pictures scatter, and neither the picture nor its caption. A
net above it lets the starting noise decide the colour. `one wave` is the error of the waves that fit the picture once,
the lowest frequency above the mean: no norm takes those away.
"""

from dataclasses import dataclass, field

import torch

from data.cli import command, location
from data.storage.shards import find_shards
from data.text.meta import TextMeta
from model.diffusion import Diffusion
from model.super_resolution import AUG_LEVEL, augment_at
from train.checkpoint.checkpoint import Checkpoint
from train.evaluation.eval_set import EvalSet
from train.weights.trained_net import load_net


@dataclass
class MeanColour:
    """Measures mse_mean of the averaged weights of some checkpoints.

    run: the folder of a run.
    at: steps of its checkpoints.
    shards: captioned pictures.
    text: the embeddings of their captions.
    samples: pictures, chosen at random.
    timesteps: at which the pictures are noised.
    """

    run: str = location()
    at: list[int] = field(default_factory=list)
    shards: str = location()
    text: str = location()
    samples: int = 96
    timesteps: list[int] = field(default_factory=lambda: [999, 980, 937, 812, 500])


@torch.no_grad()
def measure(args: MeanColour) -> None:
    """Print the table."""
    found = EvalSet(find_shards(args.shards), args.samples, 0, args.text, TextMeta.read(args.text))
    text = torch.from_numpy(found.embeddings(0, args.samples)).float()
    columns = [f"{t}: {name}" for t in args.timesteps for name in ("by t alone", "own", "another's", "one wave")]
    print(f"| step | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for step in args.at:
        checkpoint = Checkpoint.open(f"{args.run}/checkpoints/step-{step:08d}")
        unet, diffusion = load_net(checkpoint, "ema", torch.device("cpu")), Diffusion(checkpoint.diffusion_steps)
        size, small = checkpoint.model.image_size, checkpoint.model.low_res_size
        x_start = torch.from_numpy(found.pictures(0, args.samples, size)).float() / 127.5 - 1
        spread = x_start.mean((2, 3)).var(0).mean() * size * size
        generator, cells = torch.Generator().manual_seed(0), []
        given: list[tuple[torch.Tensor, ...]] = [(text,), (text.roll(1, 0),)]
        if small:
            low_res = torch.from_numpy(found.pictures(0, args.samples, small)).float() / 127.5 - 1
            noise = torch.randn(x_start.shape, generator=generator)
            low_res, aug_t = augment_at(diffusion, low_res, AUG_LEVEL, noise)
            given = [(text, low_res, aug_t), (text, low_res.roll(1, 0), aug_t)]
        for timestep in args.timesteps:
            t = torch.full((args.samples,), timestep)
            noise = torch.randn(x_start.shape, generator=generator)
            x_t, signal = diffusion.q_sample(x_start, t, noise), diffusion.alphas_cumprod[timestep]
            cells.append(float(signal * spread / (signal * spread + 1 - signal)))
            errors = [unet(x_t, t, *one)[:, :3] - noise for one in given]
            cells += [size * size * float(error.mean((2, 3)).square().mean()) for error in errors]
            waves = torch.fft.fft2(errors[0], norm="ortho").abs().square().mean((0, 1))
            cells.append(float((waves[0, 1] + waves[1, 0]) / 2))
        print(f"| {step} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, MeanColour, argv)


if __name__ == "__main__":
    main()
