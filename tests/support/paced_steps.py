"""Steps of a rank behind a limited link: python -m tests.support.paced_steps OUT RATIOS COMPUTE STEPS.

RATIOS: a list in JSON, for each case the time that a step's collectives take of the link, as a share of COMPUTE, the
seconds of forward and backward; 0 for no limit.  OUT: gets what rank 0 found.

The real engine says how its backward goes: which bucket it hands to the all-reduce at which moment. On a CPU DeepSpeed
has no streams and waits for each all-reduce where it is called, so its own time can show no overlap. That of a driver
can: it sleeps where the engine computes, and all-reduces as many bytes at the same moments. As on a GPU, the backward
goes on during an all-reduce, and waits for it before the next one (average_tensor in DeepSpeed's stage_1_and_2.py).
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import DataConfig
from launch.cost.traffic import collectives
from model.config import UNetConfig
from tests.support.handed_over import handed_over
from tests.support.namespaces import limit, sent
from tests.support.overlapped_steps import OVERLAPPING, behind_backward, make_net
from train import engine as engine_module
from train.config import Config, OptimConfig
from train.engine import build_engine, init_distributed
from train.monitor.memory import partition
from train.monitor.step_memory import inputs

# Of the released form, with 8.8 million parameters: its largest is a thirtieth of it, as XL's is.
NET = UNetConfig(
    model_channels=32, norm_groups=8, num_head_channels=32, encoder_dim=64, encoder_channels=128, att_pool_heads=8
)
WAYS = {"behind": behind_backward, "inside": OVERLAPPING}
FORWARD = 1 / 3  # of forward and backward


@dataclass(frozen=True, slots=True)
class Backward:
    """What the engine hands over: the elements of each all-reduce, and the share of the backward that came before."""

    sizes: list[int]
    moments: list[float]


def main(out: str, ratios: str, compute: str, steps: str) -> None:
    rank, ranks, _ = init_distributed()
    torch.set_num_threads(1)
    config = Config(
        model=NET, precision="bf16", global_batch=ranks, micro_batch=1, optim=OptimConfig("adamw"),
        data=DataConfig(streams=1),
    )  # fmt: skip
    found: dict = {"engine": {}, "cases": []}
    backwards = {}
    for way, zero in WAYS.items():
        backwards[way], trained, found["engine"][way] = of_engine(config, rank, ranks, zero)
    plan = collectives(trained, ranks, weight_bytes=2)
    found |= {"trained": trained, "planned": plan.sent}
    found |= {name: {way: getattr(b, name) for way, b in backwards.items()} for name in ("sizes", "moments")}
    driver = Driver(trained, ranks, float(compute))
    for ratio in json.loads(ratios):
        mbit = 8e-6 * plan.sent / (ratio * driver.compute) if ratio else 0.0
        limit(mbit)
        seconds = timed(driver, backwards, int(steps))
        found["cases"].append({"ratio": ratio, "mbit": mbit} | seconds)
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()


def of_engine(
    config: Config, rank: int, ranks: int, zero: Callable[..., dict[str, object]]
) -> tuple[Backward, int, list[int]]:
    """How the backward of the real engine goes, the number of parameters, and the bytes that each rank sends a step."""
    engine_module.zero_1 = zero
    engine = build_engine(make_net(config), config, ranks)
    torch.manual_seed(100 + rank)
    for _ in range(2):  # the first one also makes what is kept
        dist.barrier()
        before = sent()
        record = handed_over(engine, engine(*inputs(config.model, 1, 77)).float().square().mean())
        engine.step()
        dist.barrier()
        bytes_sent = sent() - before
    trained = sum(parameter.numel() for parameter in engine.model.parameters())
    engine.engine.destroy()
    moments = [min(at / record.end, 1.0) for at, _ in record.buckets]
    of_all: list = [None] * ranks
    dist.all_gather_object(of_all, (moments, bytes_sent))
    return Backward([size // 2 for _, size in record.buckets], of_all[0][0]), trained, [sent for _, sent in of_all]


class Driver:
    """The collectives of a step, and sleep in place of what a GPU computes."""

    def __init__(self, trained: int, ranks: int, compute: float) -> None:
        self.compute = compute
        part = partition(trained, ranks)
        self.part, self.weights = torch.ones(part).bfloat16(), torch.ones(part * ranks).bfloat16()
        self.gradients = torch.zeros(trained).bfloat16()

    def step(self, backward: Backward) -> None:
        """Forward, backward with its all-reduces, and the all-gather of the weights."""
        time.sleep(FORWARD * self.compute)
        now, running = 0.0, None
        for size, moment in zip(backward.sizes, backward.moments, strict=True):
            time.sleep((moment - now) * (1 - FORWARD) * self.compute)
            now = moment
            if running:
                running.wait()
            running = dist.all_reduce(self.gradients[:size], async_op=True)
        time.sleep((1 - now) * (1 - FORWARD) * self.compute)
        if running:
            running.wait()
        dist.all_gather_into_tensor(self.weights, self.part)


def timed(driver: Driver, backwards: dict[str, Backward], steps: int) -> dict[str, list[float]]:
    """Seconds of each step by way, those of the slowest rank; the ways take turns, after one that fills the link."""
    seconds: dict[str, list[float]] = {way: [] for way in backwards}
    for turn in range(steps + 1):
        for way, backward in backwards.items():
            dist.barrier()
            began = time.monotonic()
            driver.step(backward)
            slowest = torch.tensor(time.monotonic() - began)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn:
                seconds[way].append(float(slowest))
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
