"""Does training with the few-bit GELU end where the exact one does? Several seeds each, on the demo scenes.

python -m tests.benchmarks.fewbit_training [out=runs/fewbit steps=400 seeds=5 picture=docs/images/fewbit_training.png]
makes the demo data where it's missing, skips runs that are done, prints a table in Markdown and draws the curves.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from data.cli import command, location
from tests.benchmarks.commands import run
from train.monitor.plots import save_figure

ACTIVATIONS = ("gelu", "gelu_3bit")
# Smaller than the smoke run's net, so that the whole takes minutes on two cores.
NET = ("model.image_size=32", "model.channel_mult=[1,2,2]", "model.attention_resolutions=[16,8]", "micro_batch=16")
LAST = 100  # the steps over which a run's end is judged


@dataclass
class Training:
    """Trains the smoke experiment's net with each activation and seed.

    out: folder for the data and the runs.
    steps: of each training.
    seeds: trainings of each activation.
    picture: a .png for the curves.
    """

    out: str = location("runs/fewbit")
    steps: int = 400
    seeds: int = 5
    picture: str = location("docs/images/fewbit_training.png")


def curve(args: Training, activation: str, seed: int) -> np.ndarray:
    """The mse [steps] of one run, trained unless it already is."""
    folder = Path(args.out) / f"{activation}-{seed}"
    if not (folder / f"checkpoints/step-{args.steps:08d}").exists():
        print(f"training {folder}", file=sys.stderr, flush=True)
        run("train/main.py", "+experiment=smoke", f"run_dir={folder}", f"seed={seed}", f"steps={args.steps}",
            *NET, f"model.activation={activation}", "log_every=1", f"save_every={args.steps}", "wandb.mode=disabled",
            f"data.shards={args.out}/demo/shards", f"data.text={args.out}/demo/text")  # fmt: skip
    return np.array([json.loads(line)["mse"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def draw(curves: dict[str, list[np.ndarray]], path: str) -> None:
    """Every run's mse, smoothed over 20 steps, a colour for each activation."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (activation, runs) in enumerate(curves.items()):
        for seed, values in enumerate(runs):
            smooth = np.convolve(values, np.ones(20) / 20, "valid")
            axes.plot(
                range(20, len(values) + 1), smooth, color=f"C{number}", lw=0.9, label=None if seed else activation
            )
    axes.set(xlabel="step", ylabel="mse, mean of 20 steps", yscale="log", title="Demo scenes: each line is one seed")
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def compare(args: Training) -> None:
    """Train what is missing, then print the table."""
    demo = f"{args.out}/demo"
    run("-m", "data.demo", f"out={demo}/shards")
    run("-m", "data.tiny_t5", f"out={demo}/encoder")
    run("-m", "data.embed", f"shards={demo}/shards", f"out={demo}/text", f"encoder={demo}/encoder")
    curves = {a: [curve(args, a, seed) for seed in range(args.seeds)] for a in ACTIVATIONS}
    draw(curves, args.picture)
    ends = {a: [float(c[-LAST:].mean()) for c in runs] for a, runs in curves.items()}
    print(f"Means of {args.seeds} seeds; the mse is that of the last {LAST} of {args.steps} steps.\n")
    print("| activation | mse | standard deviation of a seed | less the exact one's with the same seed |")
    print("|---|---:|---:|---:|")
    for activation, values in ends.items():
        differences = [a - b for a, b in zip(values, ends["gelu"], strict=True)]
        error = statistics.stdev(differences) / args.seeds**0.5
        print(
            f"| {activation} | {statistics.mean(values):.4f} | {statistics.stdev(values):.4f} "
            f"| {statistics.mean(differences):+.4f} ± {error:.4f} |"
        )


def main(argv: list[str] | None = None) -> None:
    command(compare, Training, argv)


if __name__ == "__main__":
    main()
