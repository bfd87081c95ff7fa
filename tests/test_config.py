"""The configurations: what the card says stands in if_i_xl, and mistakes are told in words."""

import math
from pathlib import Path

import pytest
import torch

from train.compose import compose_config
from train.config import Config, accumulation
from train.main import check_nodes
from train.summary import parameters


def load(repo: Path, *overrides: str) -> Config:
    return compose_config(list(overrides))


@pytest.mark.parametrize(
    ("name", "count", "batch", "steps", "ranks"),
    [
        ("if_i_xl", 4_304_695_110, 3072, 2_420_000, 512),
        ("if_i_l", 935_365_830, 3200, 3_000_000, 400),
        ("if_i_m", 371_605_830, 3072, 2_500_000, 128),
    ],
)
def test_the_released_sizes_are_as_the_card_says(repo, name, count, batch, steps, ranks):
    config = load(repo, f"+experiment={name}")
    assert parameters(config) == (count, 0)
    assert (config.global_batch, config.steps, config.diffusion_steps) == (batch, steps, 1000)
    assert accumulation(config, ranks) == 1
    optim, data = config.optim, config.data
    assert (optim.name, config.precision, config.model.activation) == ("adamw8bit", "bf16", "gelu_3bit")
    assert (optim.lr_start, optim.lr_peak, optim.lr_end, optim.warmup_steps) == (2e-6, 5e-5, 5e-9, 10_000)
    assert (data.tokens, data.cond_drop_prob, data.crop_shift) == (77, 0.1, 0.1)
    assert (config.model.image_size, config.model.encoder_dim, config.model.att_pool_heads) == (64, 4096, 64)
    assert data.streams % ranks == 0, "each shard is read by one rank"


def test_every_experiment_composes(repo):
    names = [path.stem for path in (repo / "conf" / "experiment").glob("*.yaml")]
    # A fine-tuning says what it begins from.
    folders = {load(repo, f"+experiment={name}", "init_from=weights").run_dir for name in names}
    assert len(folders) == len(names) >= 5, "each experiment has a folder of its own"


def test_the_schedule_is_the_cards(repo):
    from train.engine import one_cycle

    config = load(repo, "+experiment=if_i_xl", "steps=5000", "optim.warmup_steps=100")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.999))
    scheduler = one_cycle(optimizer, config.optim, config.steps)
    lrs = []
    for _ in range(config.steps):
        lrs.append(scheduler.get_last_lr()[0])
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        optimizer.step()
        scheduler.step()
    assert math.isclose(lrs[0], 2e-6, rel_tol=1e-9)
    assert math.isclose(lrs[99], 5e-5, rel_tol=1e-9) and max(lrs) == lrs[99]
    assert math.isclose(lrs[-1], 5e-9, rel_tol=1e-6)
    half = (5e-5 + 5e-9) / 2
    assert math.isclose(lrs[99 + 2450], half, rel_tol=1e-2), "half way down the cosine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=100", r"optim.warmup_steps=10000 must lie between 2 and steps=100 - 1"),
        ("precision=fp8", "precision=fp8 must be one of bf16, fp32"),
        ("optim.name=sgd", "optim.name=sgd must be one of adamw8bit, adamw"),
        ("data.cond_drop_prob=1.5", "data.cond_drop_prob=1.5 must lie between 0 and 1"),
        ("optim.lr_start=1e-3", r"optim.lr_start=0.001 <= optim.lr_peak=5e-05 does not hold"),
        ("data.streams=4000", "data.streams=4000 must lie between 1 and global_batch=3072"),
        ("micro_batch=0", "micro_batch=0 must be at least 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("sample.prompts=0", "sample.prompts=0 must be at least 1"),
        ("sample.steps=2000", "sample.steps=2000 must be at most diffusion_steps=1000"),
    ],
)
def test_values_that_clash_are_named(repo, override, message):
    with pytest.raises(ValueError, match=message):
        load(repo, "+experiment=if_i_xl", override)


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_one_that_fits(repo):
    config = load(repo, "+experiment=if_i_xl")
    with pytest.raises(ValueError, match=r"3072 is not a multiple of 100 ranks x micro_batch=6: no micro_batch fits"):
        accumulation(config, 100)
    with pytest.raises(ValueError, match=r"micro_batch=8 would fit 384 ranks"):
        accumulation(load(repo, "+experiment=if_i_xl", "micro_batch=7"), 384)


def test_a_launcher_that_takes_one_of_several_nodes_is_told():
    job = {"SLURM_JOB_NUM_NODES": "2", "LOCAL_SIZE": "8"}
    with pytest.raises(ValueError, match="the job has 2 nodes, and all 8 ranks were started on this one"):
        check_nodes(job, 8)
    with pytest.raises(ValueError, match="the job has 2 nodes"):
        check_nodes({"SLURM_JOB_NUM_NODES": "2", "LOCAL_WORLD_SIZE": "1"}, 1)
    check_nodes(job, 16)
    check_nodes({**job, "SLURM_STEP_NUM_NODES": "1"}, 8)
    check_nodes({"SLURM_JOB_NUM_NODES": "2"}, 8)  # a task a rank
    check_nodes({"LOCAL_SIZE": "8"}, 8)
