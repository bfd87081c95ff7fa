"""A step of the real engine on a rank, and the bytes of its real tensors: python -m tests.measured_step OUT OVERRIDES.

Run by tests/test_plan.py, one process a rank.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from launch.cost.step_cost import inputs
from model.unet import UNet
from train.compose import compose_config
from train.ema import EMA
from train.engine import build_engine, init_distributed


def size(tensors) -> int:
    """Bytes of the tensors among them."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def counted(name: str, into: dict[str, int]) -> None:
    """Add up the bytes of the tensors that a collective of torch.distributed is given."""
    real = getattr(dist, name)
    into[name] = 0

    def collective(*args, **kwargs):
        # The first is the result: the whole tensor.
        into[name] += size([[*args, *kwargs.values()][0]])
        return real(*args, **kwargs)

    setattr(dist, name, collective)


def profiled(action) -> tuple[int, int]:
    """Bytes that the allocator gave out and did not get back while it ran, and the most at any moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        kept_alive = action()
    now = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept_alive
    return now, most


def main(out: str, *overrides: str) -> None:
    config = compose_config(list(overrides))
    sent: dict[str, int] = {}
    for name in ("all_reduce", "all_gather_into_tensor"):  # DeepSpeed looks them up when it begins
        counted(name, sent)
    rank, ranks, _ = init_distributed()
    unet = UNet(config.model)
    engine = build_engine(unet, config, ranks)
    ema = EMA(engine, config.ema_decay)
    args = inputs(config.model, config.micro_batch, config.data.tokens)
    zero = engine.engine.optimizer
    for name in sent:
        sent[name] = 0
    found = {}
    for _ in range(config.global_batch // (ranks * config.micro_batch)):
        engine.backward(engine(*args).float().square().mean())
        # The last micro batch of a step leaves none: they are reduced, and the rank's part is kept elsewhere.
        found["gradients"] = max(found.get("gradients", 0), size(p.grad for p in unet.parameters()))
        engine.step()
    ema.update(engine, 1)
    found |= {
        "weights": size(zero.bit16_groups_flat),
        "master": size([engine.master]),
        "moments": size(engine.moments.values()),
        "ema": size([ema.average]),
        "bucket": zero.reduce_bucket_size * zero.bit16_groups_flat[0].element_size(),
        "parameters": sum(p.numel() for p in unet.parameters()),
    } | sent
    if config.optim.name == "adamw8bit":
        assert {t.dtype for t in engine.moments.values()} & {torch.uint8}, "the part is large enough for 8 bits"
    if rank == 0:
        # The net itself, without DeepSpeed's hooks and with weights of its own, on which the plan's walk is walked too.
        bare = UNet(config.model).to(next(unet.parameters()).dtype)
        found["kept"] = profiled(lambda: bare(*args))[0]
        found["peak"] = profiled(lambda: bare(*args).sum().backward())[1]
        found["accumulated_peak"] = profiled(lambda: bare(*args).sum().backward())[1] + found["gradients"]
        Path(out).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
