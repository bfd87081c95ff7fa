r"""Runs' scores over their training: `train.evaluate` on several checkpoints, a table in Markdown and two pictures.

python -m tests.benchmarks.over_training runs=[runs/scenes-0,runs/scenes-1] at=[250,500,1200] picture=FILE.png \
    samples_picture=FILE.png shards=... text=... scores=[alignment] ...
The runs differ in their seed alone. Arguments that are not its own go to train.evaluate. What is evaluated already is
not done again.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from data.cli import help_text, location, parse, run_command
from data.progress import each
from data.storage.shards import find_shards
from tests.benchmarks.commands import own_and_rest, run
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import Pictures
from train.evaluation.scene_alignment import alignment
from train.monitor.plots import plot_grid, save_figure
from train.monitor.run_log import METRICS, read_metrics

# Pictures beside each other in the picture of samples.
SHOWN = 8
VALIDATION = "validation/mse"
# Of an alignment.
PARTS = ("colour", "shape", "size", "count", "relation", "tone")
# In a line of scores, what is no score.
UNDRAWN = ("guidance_scale", "manifest")


@dataclass
class OverTraining:
    """Evaluates several checkpoints of runs with train.evaluate; other arguments than its own go there.

    runs: the folders of the runs, of one experiment with several seeds.
    at: steps of the checkpoints, as in at=[250,500].
    picture: a .png for the scores and the validation loss.
    samples_picture: a .png for the first run's pictures, a row for each checkpoint and guidance scale.
    """

    runs: list[str] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    picture: str = location("")
    samples_picture: str = location("")


def folder(run_dir: str, step: int) -> Path:
    """Where the evaluation of a checkpoint goes."""
    return Path(run_dir) / "evaluation" / f"step-{step:08d}"


def scores_at(run_dir: str, step: int, rest: list[str]) -> list[dict[str, float]]:
    """A line for each guidance scale.  Raises: SystemExit if it cannot be evaluated."""
    out = folder(run_dir, step)
    run("-m", "train.evaluate", f"checkpoint={run_dir}/checkpoints/step-{step:08d}", f"out={out}", *rest)
    return json.loads((out / "scores.json").read_text())["scores"]


def draw(args: OverTraining, steps: list[int], found: dict[int, list[list[dict[str, float]]]]) -> None:
    """A panel for each score and one for the validation loss: the mean over the runs, a band from lowest to highest.

    found: the lines of each run, by step.  Broken: the pictures under one another's captions.
    """
    first = found[steps[0]][0]
    names = [name for name in first[0] if not name.endswith(("_std", "_chance")) and name not in UNDRAWN]
    losses = [[line for line in read_metrics(Path(r) / METRICS) if VALIDATION in line] for r in args.runs]
    figure, panels = plt.subplots(
        1, len(names) + any(losses), figsize=(5 * (len(names) + any(losses)), 4), squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels.flat, names, strict=False):
        for at, line in enumerate(first):
            label = f"guidance {line['guidance_scale']:g}"
            _band(axes, steps, [[lines[at][name] for lines in found[step]] for step in steps], label, f"C{at}")
            if f"{name}_chance" in line:
                chance = [statistics.mean(lines[at][f"{name}_chance"] for lines in found[step]) for step in steps]
                axes.plot(steps, chance, "--", color=f"C{at}", alpha=0.5, label="under others' captions")
        axes.set(xlabel="step", ylabel=name, ylim=(0, None))
    if any(losses):
        axes, at_steps = panels.flat[-1], [line["step"] for line in losses[0]]
        _band(axes, at_steps, [[line[VALIDATION] for line in lines] for lines in zip(*losses, strict=True)], "", "C2")
        axes.set(xlabel="step", ylabel=VALIDATION, yscale="log")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels.flat[: len(names)]:
        axes.legend(frameon=False)
    save_figure(figure, Path(args.picture))


def _band(axes: plt.Axes, steps: list[int], values: list[list[float]], label: str, colour: str) -> None:
    axes.plot(steps, [statistics.mean(v) for v in values], "o-", ms=3, color=colour, label=label)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)


def tell_parts(args: OverTraining, step: int, scales: list[float], rest: list[str]) -> None:
    """Print the parts of the alignment at a step, over all runs, and of the true pictures at that size."""
    pictures = _pictures(rest)
    captions, n = pictures.captions(0, pictures.samples), pictures.samples
    drawn = {
        f"guidance {scale:g}": np.concatenate([_drawn(run_dir, step, scale, n).read() for run_dir in args.runs])
        for scale in scales
    }
    size = next(iter(drawn.values())).shape[-1]
    print(f"\n| step {step} | {' | '.join(PARTS)} |\n|---|{'---:|' * len(PARTS)}")
    for name, images in {**drawn, "true pictures": pictures.pictures(0, n, size)}.items():
        found = [
            alignment(np.ascontiguousarray(image.transpose(1, 2, 0)), captions[i % n]) for i, image in enumerate(images)
        ]
        given = {part: [v for one in found if (v := getattr(one, part)) is not None] for part in PARTS}
        print(f"| {name} | {' | '.join(f'{statistics.mean(values):.2f}' for values in given.values())} |")


def _pictures(rest: list[str]) -> Pictures:
    given = dict(arg.split("=", 1) for arg in rest)
    return Pictures(find_shards(given["shards"]), int(given["samples"]), int(given.get("seed", 0)))


def _drawn(run_dir: str, step: int, scale: float, samples: int) -> ChunkedArray:
    return ChunkedArray(folder(run_dir, step) / f"guidance-{scale:g}", "images", samples)


def draw_samples(args: OverTraining, steps: list[int], scales: list[float], rest: list[str]) -> None:
    """The first pictures of the first run at each checkpoint: the same captions and seeds in every row."""
    pictures = _pictures(rest)
    rows = [(step, scale) for step in steps for scale in scales]
    drawn = [_drawn(args.runs[0], step, scale, pictures.samples).read(0, SHOWN) for step, scale in rows]
    labels = [f"step {step}, guidance {scale:g}" for step, scale in rows]
    captions = pictures.captions(0, SHOWN) * len(rows)
    title = "captions that it was not trained on; the same noise in each column"
    plot_grid(np.concatenate(drawn), captions, title, Path(args.samples_picture), SHOWN, labels)


def evaluate(argv: list[str]) -> None:
    """Evaluate what is missing, then print the table: the mean over the runs, and each of them."""
    own, rest = own_and_rest(OverTraining, argv)
    args = parse(OverTraining, own)
    steps = sorted(args.at)
    found: dict[int, list[list[dict[str, float]]]] = {step: [] for step in steps}
    for step, run_dir in each([(step, run_dir) for step in steps for run_dir in args.runs], "evaluate", "checkpoint"):
        found[step].append(scores_at(run_dir, step, rest))
    names = [name for name in found[steps[0]][0][0] if name != "manifest"]
    print(f"| step | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for step in steps:
        for lines in zip(*found[step], strict=True):
            cells = [_cell([line[name] for line in lines]) for name in names]
            print(f"| {step} | {' | '.join(cells)} |")
    scales = [line["guidance_scale"] for line in found[steps[0]][0]]
    if "alignment" in names:
        tell_parts(args, steps[-1], scales, rest)
    if args.picture:
        draw(args, steps, found)
    if args.samples_picture:
        draw_samples(args, steps, scales, rest)


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(set(values)) == 1 else f"{mean} ({', '.join(f'{v:.3g}' for v in values)})"


def main(argv: list[str] | None = None) -> None:
    run_command(evaluate, lambda: help_text(OverTraining), argv)


if __name__ == "__main__":
    main()
