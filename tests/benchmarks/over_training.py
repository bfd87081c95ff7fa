r"""A run's scores over its training: `train.evaluate` on several of its checkpoints, a table in Markdown and a picture.

python -m tests.benchmarks.over_training run=runs/scenes at=250,500,1200 out=evals/scenes picture=FILE.png \
    shards=... text=... scores=[alignment] ...
Arguments that are not its own go to train.evaluate. What is evaluated already is not done again.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from matplotlib import pyplot as plt
from tqdm import tqdm

from data.cli import help_text, location, parse, run_command
from tests.benchmarks.commands import run
from train.monitor.plots import save_figure


@dataclass
class OverTraining:
    """Evaluates several checkpoints of a run with train.evaluate; other arguments than its own go there.

    run: the folder of the run.
    out: evaluations go to out-STEP.
    at: steps of the checkpoints, as in at=250,500.
    picture: a .png for the scores.
    """

    run: str = location()
    out: str = location()
    at: list[int] = field(default_factory=list)
    picture: str = location("")


def scores_at(args: OverTraining, step: int, rest: list[str]) -> list[dict[str, float]]:
    """A line for each guidance scale.  Raises: SystemExit if it cannot be evaluated."""
    out = Path(f"{args.out}-{step:08d}")
    run("-m", "train.evaluate", f"checkpoint={args.run}/checkpoints/step-{step:08d}", f"out={out}", *rest)
    return json.loads((out / "scores.json").read_text())["scores"]


def draw(found: dict[int, list[dict[str, float]]], path: str) -> None:
    """A panel for each score, a line for each guidance scale; broken: the pictures under one another's captions."""
    first = next(iter(found.values()))
    names = [
        name
        for name in first[0]
        if name not in ("guidance_scale", "manifest") and not name.endswith(("_std", "_chance"))
    ]
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for axes, name in zip(panels.flat, names, strict=True):
        for at, line in enumerate(first):
            values = [lines[at][name] for lines in found.values()]
            axes.plot(list(found), values, "o-", color=f"C{at}", label=f"guidance {line['guidance_scale']:g}")
            if f"{name}_chance" in line:
                chance = [lines[at][f"{name}_chance"] for lines in found.values()]
                axes.plot(list(found), chance, "--", color=f"C{at}", alpha=0.5, label="under others' captions")
        axes.set(xlabel="step", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, Path(path))


def evaluate(argv: list[str]) -> None:
    """Evaluate what is missing, then print the table."""
    own = {f.name for f in fields(OverTraining)}
    args = parse(OverTraining, [arg for arg in argv if arg.partition("=")[0] in own])
    rest = [arg for arg in argv if arg.partition("=")[0] not in own]
    found = {step: scores_at(args, step, rest) for step in tqdm(sorted(args.at), args.run, unit="checkpoint")}
    names = list(next(iter(found.values()))[0])
    print(f"| step | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for step, lines in found.items():
        for line in lines:
            print(f"| {step} | {' | '.join(f'{line[name]:.4g}' for name in names)} |")
    if args.picture:
        draw(found, args.picture)


def main(argv: list[str] | None = None) -> None:
    run_command(evaluate, lambda: help_text(OverTraining), argv)


if __name__ == "__main__":
    main()
