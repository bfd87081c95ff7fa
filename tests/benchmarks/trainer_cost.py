"""What the trainer costs beside the net: `python -m tests.benchmarks.trainer_cost work=SCRATCH`.

The whole trainer (loader, noise, EMA, guards, metrics, W&B offline, a checkpoint) against a bare loop of forward,
backward and DeepSpeed's step on one ready batch, in turns in one process. Then two ranks against one, with two
independent trainings at the same time as the ceiling.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.cli import command, location
from model.unet import UNet
from tests.support.trainings import SMALL, make_data, metrics, start
from train.compose import compose_config
from train.config import Config, accumulation
from train.engine import build_engine, init_distributed
from train.inputs import find_inputs, resolve_text_shape
from train.loop import train

REPO = Path(__file__).resolve().parent.parent.parent
WARM, WINDOW = 10, 10


@dataclass
class TrainerCost:
    """Measures what the trainer costs beside the net.

    work: a scratch folder.
    rounds: turns of each.
    steps: of a turn.
    batch: samples of a rank's batch, in two micro batches.
    """

    work: str = location()
    rounds: int = 3
    steps: int = 40
    batch: int = 8


def overrides(args: TrainerCost, data: Path, ranks: int = 1) -> list[str]:
    """The small net of the tests, timed in windows of so many steps."""
    own = {
        "steps": args.steps, "global_batch": args.batch * ranks, "micro_batch": args.batch // 2, "log_every": WINDOW,
        "save_every": args.steps // 2, "data.shards": data / "shards", "data.text": data / "text",
        "wandb.mode": "offline", "data.workers": 1,
    }  # fmt: skip
    return [o for o in SMALL if o.split("=")[0] not in own] + [f"{name}={value}" for name, value in own.items()]


def seconds_a_step(run_dir: Path, batch: int) -> float:
    """Mean over the windows after the first."""
    return statistics.mean(batch / line["images_per_second"] for line in metrics(run_dir)[1:])


def bare(config: Config) -> float:
    """Seconds a step of forward, backward and step on one batch."""

    torch.manual_seed(0)
    engine = build_engine(UNet(config.model, config.recompute), config, 1)
    size, n = config.model.image_size, config.micro_batch
    x, t = torch.randn(n, 3, size, size), torch.randint(0, 1000, (n,))
    text = torch.randn(n, config.data.tokens, config.model.encoder_dim)
    for step in range(config.steps):
        if step == WARM:
            began = time.perf_counter()
        for _ in range(accumulation(config, 1)):
            engine.backward(engine(x, t, text).float().square().mean())
            engine.step()
    return (time.perf_counter() - began) / (config.steps - WARM)


def overhead(args: TrainerCost, data: Path) -> None:
    """Print the ratio of the whole trainer to the bare loop."""
    config = compose_config(overrides(args, data))
    resolve_text_shape(config)
    rank, ranks, device = init_distributed()
    inputs, whole, alone = find_inputs(config), [], []
    for number in range(args.rounds):
        run_dir = Path(args.work) / f"whole-{number}"
        train(replace(config, run_dir=str(run_dir)), inputs, rank, ranks, device)
        whole.append(seconds_a_step(run_dir, config.global_batch))
        alone.append(bare(config))
        print(f"whole {whole[-1] * 1000:.0f} ms, bare {alone[-1] * 1000:.0f} ms", flush=True)
    ratios = [w / b for w, b in zip(whole, alone, strict=True)]
    print(f"whole trainer / bare loop: {statistics.median(ratios):.3f} (each turn: {[round(r, 3) for r in ratios]})")


def scaling(args: TrainerCost, data: Path) -> None:
    """Print images/s of two ranks against two independent trainings and against one."""
    found: dict[str, list[float]] = {"one": [], "two ranks": [], "two independent": []}

    def run(names: list[str], ranks: int) -> float:
        folders = [Path(args.work) / name for name in names]
        started = [start(REPO, data, folder, *overrides(args, data, ranks), ranks=ranks) for folder in folders]
        for process in started:
            _, err = process.communicate()
            assert process.returncode == 0, err[-2000:]
        return sum(args.batch * ranks / seconds_a_step(folder, args.batch * ranks) for folder in folders)

    for number in range(args.rounds):
        found["one"].append(run([f"one-{number}"], 1))
        found["two ranks"].append(run([f"two-{number}"], 2))
        found["two independent"].append(run([f"a-{number}", f"b-{number}"], 1))
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(", ".join(f"{name} {value:.1f} images/s" for name, value in middle.items()))
    print(f"two ranks / two independent: {middle['two ranks'] / middle['two independent']:.3f}")
    print(f"two ranks / one: {middle['two ranks'] / middle['one']:.2f}")


def measure(args: TrainerCost) -> None:
    data = Path(args.work) / "data"
    if not data.exists():
        make_data(data)
    overhead(args, data)
    scaling(args, data)


def main(argv: list[str] | None = None) -> None:
    command(measure, TrainerCost, argv)


if __name__ == "__main__":
    main()
