"""512 ranks without 512 GPUs: the real engine with a fake process group, and plans.

docs/measurements/plan.md says what this leaves open.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.loader.order import Order
from launch.cost.traffic import checkpoint_bytes
from train.checkpoint.format import part_file
from train.checkpoint.reader import CheckpointReader
from train.compose import compose_config
from train.config import accumulation
from train.monitor.memory import partition, states

RANKS = 512
OVERRIDES = (
    "+experiment=if_i_xl steps=40 optim.warmup_steps=10 precision=fp32 model.image_size=16 model.model_channels=32 "
    "model.norm_groups=8 model.channel_mult=[1,2] model.num_res_blocks=1 model.attention_resolutions=[8] "
    "model.num_head_channels=32 model.encoder_dim=64 model.encoder_channels=128 model.att_pool_heads=4"
)
NET = OVERRIDES.split()


@pytest.fixture(scope="module", params=[0, RANKS - 1])
def one_of_many(request, repo, tmp_path_factory) -> tuple[int, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("rank") / "found.safetensors"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "tests.support.rank_of_many", str(request.param), str(RANKS), str(out), *NET]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, load_file(out)


def test_each_rank_holds_the_part_that_the_plan_says(one_of_many):
    rank, found = one_of_many
    count = len(found["weights"])
    size = partition(count, RANKS)
    padded = torch.cat([found["weights"], torch.zeros(size * RANKS - count)])
    assert len(found["master"]) == size
    assert torch.equal(found["master"], padded[rank * size : (rank + 1) * size])
    assert torch.equal(found["ema"], found["master"])


def test_batch_and_schedule_know_nothing_of_the_ranks(one_of_many):
    _, found = one_of_many
    config = compose_config(NET)
    assert int(found["batch"]) == 3072 and int(found["accumulation"]) == 1
    lrs = found["lrs"].tolist()
    assert len(lrs) == config.steps and np.argmax(lrs) == 9
    assert [lrs[0], max(lrs), lrs[-1]] == pytest.approx([2e-6, 5e-5, 5e-9], rel=1e-6)


def test_the_batch_at_every_number_of_ranks():
    config = compose_config(["+experiment=if_i_xl"])
    for ranks in (512, 256, 64, 8):
        assert ranks * config.micro_batch * accumulation(config, ranks) == 3072
    for ranks in (511, 504, 480):
        with pytest.raises(ValueError, match="global_batch=3072 is not a multiple"):
            accumulation(config, ranks)


def test_every_shard_is_read_by_one_rank_and_every_sample_once():
    """If_i_xl's plan over 6,000 shards of 1,000: one step and one epoch of all ranks' slots."""
    config = compose_config(["+experiment=if_i_xl"])
    data, batch = config.data, config.global_batch
    order = Order(0, [1000] * 6000, batch, data.streams, data.phases, data.shuffle_block)
    positions = np.arange(order.samples)
    epoch, stream, number, within = order.locate_all(positions)
    assert not epoch.any()
    # Which stream, block and place in it: together they name a sample, so none may come twice.
    places = (stream * (number.max() + 1) + number) * data.shuffle_block + within
    assert len(np.unique(places)) == order.samples
    rank_of_slot = np.arange(batch) // (batch // RANKS)
    ranks_of_stream = {
        (s, r) for s, r in zip(stream[: 4 * batch].tolist(), np.tile(rank_of_slot, 4).tolist(), strict=True)
    }
    assert len(ranks_of_stream) == len({s for s, _ in ranks_of_stream}) == data.streams * data.phases


def test_a_checkpoint_of_512_ranks_is_taken_up_by_others(tmp_path):
    count = 123_457
    size = partition(count, RANKS)
    flat = torch.randn(count)
    padded = torch.cat([flat, torch.zeros(size * RANKS - count)])
    for rank in range(RANKS):
        own = padded[rank * size : (rank + 1) * size].clone()
        save_file({"master": own, "ema": own + 1}, tmp_path / part_file(rank))
    parts = CheckpointReader(tmp_path, RANKS)
    for ranks in (384, 500, 1):
        part = partition(count, ranks)
        pieces = [parts.read("master", rank * part, (rank + 1) * part) for rank in range(ranks)]
        assert torch.equal(torch.cat(pieces)[:count], flat)
    written = sum((tmp_path / part_file(rank)).stat().st_size for rank in range(RANKS))
    without_moments = checkpoint_bytes(states(count, RANKS, "adamw", 2), RANKS) - RANKS * (8 * size + 4)
    headers = written - without_moments
    assert 0 < headers < RANKS * 400, "beside them headers alone; nothing at the size of XL"
