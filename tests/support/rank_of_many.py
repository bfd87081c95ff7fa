"""The real engine as one rank of many absent ones: python -m tests.support.rank_of_many RANK RANKS OUT OVERRIDES.

torch's fake process group answers every collective at once and moves nothing. Run by tests/test_scale.py.
"""

import sys

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.unet import UNet
from train.compose import compose_config
from train.config import accumulation
from train.ema import EMA
from train.engine import build_engine


def main(rank: int, ranks: int, out: str, *overrides: str) -> None:
    config = compose_config(list(overrides))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as train.engine.init_distributed has it
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    torch.manual_seed(0)
    unet = UNet(config.model, config.recompute)
    weights = torch.cat([p.detach().flatten() for p in unet.parameters()])
    engine = build_engine(unet, config, ranks)
    ema = EMA(engine, config.ema_decay)
    lrs = [engine.lr()]
    for _ in range(config.steps - 1):
        engine.scheduler.step()
        lrs.append(engine.lr())
    found = {
        "weights": weights,
        "master": engine.master.detach(),
        "ema": ema.average,
        "lrs": torch.tensor(lrs, dtype=torch.float64),
        "accumulation": torch.tensor(accumulation(config, ranks)),
        "batch": torch.tensor(engine.engine.train_batch_size()),
    }
    save_file({name: value.clone() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
