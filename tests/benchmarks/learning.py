"""What each choice is worth: trainings on the demo scenes at 16 px, several seeds of each, judged on held-out captions.

python -m tests.benchmarks.learning arms=ablations picture=FILE.png   [seeds=5 steps=1000 jobs=2]
python -m tests.benchmarks.learning arms=dropout steps=3000
python -m tests.benchmarks.learning arms=limits seeds=2   what limits it: groups, width, learning rate
python -m tests.benchmarks.learning arms=sizes picture=FILE.png   nets of three sizes at the same compute
python -m tests.benchmarks.learning arms=states   text states as float16 and as lowrank, which are made first, for
    each of the datasets scenes and held_out and each error of 0.01, 0.05 and 0.2, by
    python -m data.embed shards=datasets/scenes/shards out=datasets/scenes/minilm-0.01 encoder=MINILM dtype=lowrank
    error=0.01, with cleaning, compute and tokens as in datasets/scenes/minilm/meta.json
trains what is missing, goes on where it was stopped, prints a table in Markdown and draws it. The data are those of
+experiment=scenes, made as docs/measurements/results.md says.
"""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from data.checks import check_choice
from data.cli import command, location
from data.progress import each
from model.unet import UNet
from tests.benchmarks.commands import run
from train.compose import compose_config
from train.inputs import resolve_text_shape
from train.monitor.flops import training_flops
from train.monitor.plots import save_figure

BATCH = 8
# Checkpoints and validations of a run.
SAVED = 6
ONE_CORE = {"OMP_NUM_THREADS": "1"}
LAST = 0.2  # the share of a run's steps over which its loss is judged
BASE = "the recipe"
ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "ablations": {
        BASE: (),
        "exact GELU": ("model.activation=gelu",),
        "AdamW, 32 bit": ("optim.name=adamw",),
    },
    "dropout": {
        BASE: (),
        "no caption dropout": ("data.cond_drop_prob=0",),
    },
    "limits": {
        BASE: (),
        "1 group": ("model.norm_groups=1",),
        "8 groups": ("model.norm_groups=8",),
        "48 channels": ("model.model_channels=48", "model.num_head_channels=48"),
        "half the rate": ("optim.lr_peak=5e-4",),
        "twice the rate": ("optim.lr_peak=2e-3",),
    },
    "states": {
        BASE: (),
        **{
            f"lowrank {error}": (
                f"data.text=datasets/scenes/minilm-{error}",
                f"data.validation.text=datasets/held_out/minilm-{error}",
            )
            for error in ("0.01", "0.05", "0.2")
        },
    },
    "sizes": {
        "half": ("model.channel_mult=[1,1,2]",),
        BASE: (),
        "four times": ("model.model_channels=64",),
    },
}
JUDGED = ("alignment",)


@dataclass
class Learning:
    """Trains nets that differ in one choice, and judges them on held-out captions.

    arms: ablations, dropout, limits, states or sizes.
    out: folder for the runs.
    held_out: folder with the shards and text of held-out scenes.
    steps: of the recipe's net; another takes as many as cost the same.
    seeds: trainings of each.
    jobs: trainings at a time, a core each.
    samples: pictures that each net draws.
    validated: held-out samples of the validation loss.
    guidance_scales: of the sampler.
    picture: a .png for the table.
    """

    arms: str = "ablations"
    out: str = location("runs/learning")
    held_out: str = location("datasets/held_out")
    steps: int = 1000
    seeds: int = 5
    jobs: int = 2
    samples: int = 96
    validated: int = 96
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0])
    picture: str = location("")


@dataclass(slots=True)
class Arm:
    """A choice: what it changes, how many steps it is given, and what a training image costs it (FLOP)."""

    name: str
    changes: tuple[str, ...]
    steps: int
    parameters: float
    flops: float


def find_arms(args: Learning) -> list[Arm]:
    """Raises: ValueError for arms that are not known."""
    check_choice("arms", args.arms, ARMS)
    costs = {name: cost(changes) for name, changes in ARMS[args.arms].items()}
    of_base = costs[BASE][1]
    return [
        Arm(name, changes, round(args.steps * of_base / costs[name][1]), *costs[name])
        for name, changes in ARMS[args.arms].items()
    ]


def cost(changes: tuple[str, ...]) -> tuple[float, float]:
    """Parameters of the net, and FLOP of a training image."""
    config = compose_config(["+experiment=scenes", *changes])
    resolve_text_shape(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(config.model).parameters())
    return float(parameters), training_flops(config.model, config.data.tokens).total


def make(args: Learning, arm: Arm, seed: int) -> dict:
    """One run, trained and judged unless it already is: its end mse, validation mse and scores."""
    folder = Path(args.out) / args.arms / f"{arm.name.replace(' ', '_').replace(',', '')}-{seed}"
    if not (folder / f"checkpoints/step-{arm.steps:08d}").exists():
        run("train/main.py", "+experiment=scenes", f"run_dir={folder}", f"seed={seed}", f"steps={arm.steps}",
            f"global_batch={BATCH}", f"micro_batch={BATCH}", f"optim.warmup_steps={max(arm.steps // 10, 2)}",
            "log_every=1", f"save_every={arm.steps // SAVED}", "sample.every=0", "sample.prompts=2", "sample.steps=4",
            f"data.validation.shards={args.held_out}/shards", f"data.validation.text={args.held_out}/minilm",
            f"data.validation.samples={args.validated}", f"validate_every={arm.steps // SAVED}",
            *arm.changes, **ONE_CORE)  # fmt: skip
    scales = ",".join(f"{scale:g}" for scale in args.guidance_scales)
    run("-m", "train.evaluate", f"checkpoint={folder}", f"shards={args.held_out}/shards",
        f"text={args.held_out}/minilm", f"out={folder}/evaluation", f"scores=[{','.join(JUDGED)}]",
        f"samples={args.samples}", f"guidance_scales=[{scales}]", "steps=20", "micro_batch=32", **ONE_CORE)  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mse = [line["mse"] for line in lines]
    scores = json.loads((folder / "evaluation/scores.json").read_text())["scores"]
    losses = {"mse": statistics.mean(mse[-round(LAST * len(mse)) :]), "validation mse": lines[-1]["validation/mse"]}
    return losses | {
        f"{name}, guidance {line['guidance_scale']:g}": line[name] for name in (*JUDGED, "alignment_chance")
        for line in scores
    }  # fmt: skip


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Of several seeds: the mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def draw(arms: list[Arm], found: dict[str, list[dict]], path: str) -> None:
    """A panel for each figure: a dot for each seed, the mean and its error beside it."""
    names = [name for name in found[BASE][0] if "chance" not in name]
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.6), layout="constrained")
    for axes, name in zip(panels.flat, names, strict=True):
        for at, arm in enumerate(arms):
            values = [one[name] for one in found[arm.name]]
            mean, error = mean_and_error(values)
            axes.plot(np.full(len(values), at), values, "o", color=f"C{at}", ms=3, alpha=0.6)
            axes.errorbar(at + 0.2, mean, error, fmt="s", color=f"C{at}", ms=5, capsize=4)
        if name.startswith("alignment"):
            chance = [one[name.replace("alignment", "alignment_chance")] for runs in found.values() for one in runs]
            axes.axhline(statistics.mean(chance), ls="--", color="grey", lw=1)
        axes.set_xticks(range(len(arms)), [arm.name for arm in arms], rotation=30, ha="right")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    save_figure(figure, Path(path))


def compare(args: Learning) -> None:
    """Train and judge what is missing, then print the table."""
    arms = find_arms(args)
    # Seed by seed, so that what is there when it is stopped compares all arms.
    todo = [(arm, seed) for seed in range(args.seeds) for arm in arms]
    found: dict[str, list[dict]] = {arm.name: [] for arm in arms}
    with ThreadPoolExecutor(args.jobs) as pool:
        results = [pool.submit(make, args, arm, seed) for arm, seed in todo]
        try:
            for (arm, _), result in zip(todo, each(results, args.arms, "run", args.out), strict=True):
                found[arm.name].append(result.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = list(found[BASE][0])
    print(f"| | parameters | GFLOP an image | steps of {BATCH} | " + " | ".join(names) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(names))
    for arm in arms:
        figures = [mean_and_error([one[name] for one in found[arm.name]]) for name in names]
        cells = " | ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in figures)
        print(f"| {arm.name} | {arm.parameters / 1e6:.1f} M | {arm.flops / 1e9:.2f} | {arm.steps} | {cells} |")
    for arm in arms:
        # The same seed is the same net at the start, the same batches and noise: differences scatter less.
        pairs, told = list(zip(found[arm.name], found[BASE], strict=True)), []
        for name in names:
            mean, error = mean_and_error([a[name] - b[name] for a, b in pairs])
            told.append(f"{name} {mean:+.4f} ± {error:.4f}")
        if arm.name != BASE:
            print(f"\n{arm.name} less {BASE}, seed by seed: " + ", ".join(told))
    if args.picture:
        draw(arms, found, args.picture)


def main(argv: list[str] | None = None) -> None:
    command(compare, Learning, argv)


if __name__ == "__main__":
    main()
