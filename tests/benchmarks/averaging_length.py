r"""Validation loss and scores against the length of the average: of one checkpoint, a table in Markdown and a picture.

python train/main.py +experiment=scenes ema_snapshot_every=400 run_dir=runs/scenes-lengths
python -m tests.benchmarks.averaging_length checkpoint=runs/scenes-lengths lengths=[0.02,0.03,0.05,0.07,0.1,0.15,0.2] \
    picture=FILE.png shards=... text=... scores=[alignment] samples=200 guidance_scales=[1,4] steps=50
The loss is that of the run's own data.validation. Arguments that are not its own go to train.evaluate, which continues
where it was interrupted; without any there is the loss alone. A length that cannot be made is left out, and told.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data.cli import help_text, location, parse, run_command
from data.device import default_device
from data.loader.held_out import HeldOut
from model.diffusion import Diffusion
from tests.benchmarks.commands import own_and_rest, run
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.post_hoc import with_averages
from train.compose import compose_config
from train.engine import init_distributed
from train.evaluation.results import LENGTHS
from train.evaluation.validation import validation_losses
from train.inputs import find_inputs
from train.monitor.plots import plot_lengths
from train.weights.trained_net import load_net

VALIDATION = "validation/mse"


@dataclass
class AveragingLength:
    """Compares averages of several lengths; other arguments than its own go to train.evaluate.

    checkpoint: the folder of a run with snapshots, or of one of its steps.
    lengths: of the averages, as ema_length.
    experiment: of the run, whose data.validation is taken.
    picture: a .png.
    """

    checkpoint: str = location()
    lengths: list[float] = field(default_factory=lambda: [0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25])
    experiment: str = "scenes"
    picture: str = location("")


def possible(checkpoint: Checkpoint, lengths: list[float]) -> dict[float, Checkpoint]:
    """The checkpoint with each length of the average that can be made.  Raises: ValueError if these are too few."""
    found = {}
    for length in sorted(lengths):
        try:
            found[length] = with_averages(checkpoint, [length])[0]
        except ValueError as error:
            print(f"left out: {error}")
    if len(found) < 2:
        raise ValueError(f"of lengths={lengths} fewer than two can be made: take other lengths, or more snapshots")
    return found


def losses(checkpoints: dict[str, tuple[Checkpoint, str]], experiment: str) -> dict[str, float]:
    """The validation loss of each net.  checkpoints: by label, each with the name of its weights."""
    init_distributed()
    config, device, found = compose_config([f"+experiment={experiment}"]), default_device(), {}
    inputs = find_inputs(config)
    inputs.to(device)
    samples = HeldOut(
        config.data, inputs.held_out, inputs.meta,
        image_size=config.model.image_size, samples=config.data.validation.samples, micro_batch=16,
    )  # fmt: skip
    for label, (checkpoint, weights) in checkpoints.items():
        unet, diffusion = load_net(checkpoint, weights, device), Diffusion(checkpoint.diffusion_steps).to(device)
        found[label] = validation_losses(unet, diffusion, samples, inputs.text_emb, device)[VALIDATION]
        print(f"{label}: {VALIDATION} {found[label]:.5f}", flush=True)
    return found


def compare(argv: list[str]) -> None:
    """Print the table, and draw it."""
    own, rest = own_and_rest(AveragingLength, argv)
    args = parse(AveragingLength, own)
    checkpoint = Checkpoint.open(args.checkpoint)
    lengths = possible(checkpoint, args.lengths)
    nets = {f"{length:g}": (one, "ema") for length, one in lengths.items()}
    found = losses(nets | {"ema": (checkpoint, "ema"), "master": (checkpoint, "master")}, args.experiment)
    lines = [{"ema_length": length, VALIDATION: found[f"{length:g}"]} for length in lengths]
    print(f"| weights | {VALIDATION} |\n|---|---:|")
    for label, value in found.items():
        print(f"| {label} | {value:.5f} |")
    if rest:
        chosen = ",".join(nets)
        out = checkpoint.folder.parent.parent / "evaluation" / f"lengths-{checkpoint.step:08d}"
        run("-m", "train.evaluate", f"checkpoint={checkpoint.folder}", f"ema_length=[{chosen}]", f"out={out}", *rest)
        scored = json.loads((out / LENGTHS).read_text())["scores"]
        names = [name for name in scored[0] if name not in ("ema_length", "manifest")]
        print(f"\n| ema_length | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
        for line in scored:
            print(f"| {line['ema_length']:g} | {' | '.join(f'{line[name]:.4g}' for name in names)} |")
        lines += scored
    if args.picture:
        plot_lengths(lines, Path(args.picture))


def main(argv: list[str] | None = None) -> None:
    run_command(compare, lambda: help_text(AveragingLength), argv)


if __name__ == "__main__":
    main()
