"""How much the validation loss scatters over seeds, beside the training loss: short trainings on the demo scenes.

python -m tests.benchmarks.validation_spread   [seeds=4 steps=60 samples=64 jobs=1 out=runs/validation_spread]
trains what is missing and prints a table in Markdown. A seed changes the net at its start, the order, t and noise.
"""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data import demo
from data.cli import command, location
from data.embed import Embed, embed
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.benchmarks.commands import run

BATCH, LAST = 16, 0.2  # the share of a run's steps over which the training's loss is judged
NET = ("model.image_size=32", "model.channel_mult=[1,2]", "model.attention_resolutions=[16]")


@dataclass
class Spread:
    """Trains the net of the smoke run at 32 px with several seeds.

    out: folder for the data and the runs.
    seeds: trainings.
    steps: of each.
    samples: held-out samples of the validation.
    jobs: trainings at a time, a core each.
    """

    out: str = location("runs/validation_spread")
    seeds: int = 4
    steps: int = 60
    samples: int = 64
    jobs: int = 1


def make_data(folder: Path, samples: int) -> None:
    """Scenes for the training and others for the validation, with embeddings of a random encoder."""
    if (folder / "t5").exists():
        return
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    for name, number, seed in (("train", 512, 0), ("held", samples, 1)):
        demo.main([f"out={folder / name}", f"samples={number}", "shard_size=64", f"seed={seed}"])
        embed(Embed(str(folder / name), str(folder / f"{name}_text"), str(folder / "t5"), 16, "float32", "float32"))


def train(args: Spread, seed: int) -> dict[str, float]:
    """The losses at the end of one training, which is made if it is not there."""
    out = Path(args.out)
    folder = out / f"{args.steps}-{seed}"
    if not (folder / "done").exists():
        run("train/main.py", "+experiment=smoke", f"run_dir={folder}", f"seed={seed}", f"steps={args.steps}",
            f"global_batch={BATCH}", f"micro_batch={BATCH}", f"data.shards={out}/train", f"data.text={out}/train_text",
            f"data.validation.shards={out}/held", f"data.validation.text={out}/held_text",
            f"data.validation.samples={args.samples}", f"validate_every={args.steps}", "log_every=1",
            "sample.every=0", "sample.prompts=1", "sample.steps=2", f"save_every={args.steps}", "wandb.mode=disabled",
            *NET, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-round(LAST * len(lines)) :]
    return {
        "mse of the last step": lines[-1]["mse"],
        f"mse, mean of the last {len(last)} steps": statistics.mean(line["mse"] for line in last),
        "validation/mse": lines[-1]["validation/mse"],
    }


def compare(args: Spread) -> None:
    """Train what is missing, then print the table."""
    make_data(Path(args.out), args.samples)
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda seed: train(args, seed), range(args.seeds)))
    print(f"| of {args.seeds} seeds, {args.steps} steps of {BATCH} | mean | deviation | in % |\n|---|---:|---:|---:|")
    for name in found[0]:
        values = [one[name] for one in found]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        print(f"| {name} | {mean:.4f} | {deviation:.4f} | {100 * deviation / mean:.1f} |")


def main(argv: list[str] | None = None) -> None:
    command(compare, Spread, argv)


if __name__ == "__main__":
    main()
