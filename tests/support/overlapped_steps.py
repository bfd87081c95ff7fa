"""Steps of the real engine on one rank, with and without overlap: python -m tests.support.overlapped_steps OUT JSON.

JSON: a list of cases, each a list of overrides of the smoke run. OUT gets, for each case, the results of both ways.
Run by tests/test_overlap.py, one process a rank.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.unet import UNet
from tests.support.handed_over import handed_over
from train import engine as engine_module
from train.compose import compose_config
from train.config import Config, accumulation
from train.engine import build_engine, init_distributed
from train.monitor.step_memory import inputs
from train.weights.lora import add_lora

STEPS = 3
OVERLAPPING = engine_module.zero_1


def behind_backward(unet: nn.Module) -> dict[str, object]:
    """ZeRO-1 as DeepSpeed sets it up by itself: one all-reduce of all gradients after the backward."""
    return {"stage": 1}


def digest(tensors: list[Tensor]) -> str:
    """A hash of their bytes, dtypes and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def make_net(config: Config) -> UNet:
    """The net of a config, no layer of it zero."""
    torch.manual_seed(1)
    unet = UNet(config.model, config.recompute)
    if config.lora.rank:
        add_lora(unet, config.lora)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5))
    return unet


def steps(config: Config, rank: int, ranks: int) -> dict[str, object]:
    """What a rank has after a few steps."""
    engine = build_engine(make_net(config), config, ranks)
    torch.manual_seed(100 + rank)
    norms, order, buckets = [], [], []
    for _ in range(STEPS):
        for _ in range(accumulation(config, ranks)):
            loss = engine(*inputs(config.model, config.micro_batch, 5)).float().square().mean()
            record = handed_over(engine, loss)
            order.append(record.inside)
            buckets.append(len(record.buckets))
            engine.step()
        norms.append(float(engine.grad_norm()))
    found = {
        "weights": digest(list(engine.model.parameters())),
        "master": digest([engine.master]),
        "moments": digest([engine.moments[name] for name in sorted(engine.moments)]),
        "norms": norms,
        "stepped": engine.stepped,
    }
    engine.engine.destroy()
    return {"same": found, "inside": order, "buckets": buckets}


def main(out: str, cases: str) -> None:
    rank, ranks, _ = init_distributed()
    found = []
    for overrides in json.loads(cases):
        config = compose_config(overrides)
        both = []
        for zero in (behind_backward, OVERLAPPING):
            engine_module.zero_1 = zero
            both.append(steps(config, rank, ranks))
        found.append(both)
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
