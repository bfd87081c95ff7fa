"""The configurations: the released experiments are as the card says, and mistakes are named."""

import math
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from data.cli import describe, keys
from data.text.meta import TextMeta
from model.config import ACTIVATIONS
from model.unet import UNet
from train.compose import compose_config
from train.config import CODE, Config, accumulation
from train.inputs import resolve_text_shape
from train.main import check_nodes
from train.summary import describe as describe_run
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
        ("steps=100", r"optim.warmup_steps=10000 must lie between 2 and 99, one less than steps=100: change"),
        ("precision=fp8", "precision=fp8 must be one of bf16, fp32"),
        ("optim.name=sgd", "optim.name=sgd must be one of adamw8bit, adamw"),
        ("data.cond_drop_prob=1.5", "data.cond_drop_prob=1.5 must lie between 0 and 1"),
        ("optim.lr_start=1e-3", r"optim.lr_start=0.001 <= optim.lr_peak=5e-05 does not hold"),
        ("data.streams=4000", "data.streams=4000 must lie between 1 and global_batch=3072"),
        ("micro_batch=0", "micro_batch=0 must be at least 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("run_dir=''", "run_dir= is empty"),
        (f"run_dir={CODE}", "is the folder of the code itself: give the run a folder of its own"),
        ("sample.prompts=0", "sample.prompts=0 must be at least 1"),
        ("sample.prompts=[]", "has no caption: give some, or a number of captions of the data"),
        ("sample.steps=2000", "sample.steps=2000 must be at most diffusion_steps=1000"),
        ("sample.guidance_scales=[-1]", r"sample.guidance_scales=\[-1.0\] must be one or more numbers from 0 on"),
        ("recompute=all", "recompute=all must be one of none, cheap, blocks"),
        ("ema_decay=1.1", "ema_decay=1.1 must lie between 0 and 1"),
        ("wandb.mode=ofline", r"wandb.mode=ofline must be one of .*did you mean 'offline'"),
        ("text.mode=on", "text.mode=on must be one of stored, online"),
        ("lora.rank=-1", "lora.rank=-1 must be at least 0"),
        ("lora.rank=4", "lora.rank=4 adds to a trained net: name its weights in init_from"),
        ("optim.warmup_steps=1", "optim.warmup_steps=1 must be at least 2"),
        ("optim.grad_clip=-1", "optim.grad_clip=-1.0 must be at least 0"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("data.tokens=-1", "data.tokens=-1 must be at least 0"),
        ("data.phases=0", "data.phases=0 must be at least 1"),
        ("data.shuffle_block=0", "data.shuffle_block=0 must be at least 1"),
        ("data.streams=0", "data.streams=0 must be at least 1"),
        ("data.crop_shift=nan", "data.crop_shift=nan must be at least 0"),
        ("data.unreadable_shard=pass", "data.unreadable_shard=pass must be one of skip, fail"),
        ("data.images.background=256", "data.images.background=256 must be a grey level from 0 to 255"),
        (
            "data.mixture.a.shards=a data.mixture.a.text=b data.mixture.a.weight=0",
            r"data.mixture: the weights \[0.0\] must all be above 0",
        ),
        ("model.num_head_channels=33", "model.num_head_channels=33"),
        ("model.activation=relu", "model.activation=relu must be one of gelu, gelu_1bit"),
        ("model.encoder_dim=100", "model.encoder_dim=100, .* is not divisible by model.att_pool_heads=64"),
    ],
)
def test_values_that_clash_are_named(repo, override, message):
    with pytest.raises(ValueError, match=message):
        load(repo, "+experiment=if_i_xl", *override.split())


def test_an_empty_run_dir_of_a_file_is_refused():
    with pytest.raises(ValueError, match="run_dir= is empty: give the folder of the run"):
        Config(run_dir=" ")


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


def dataclasses_of(schema: type) -> list[type]:
    """A dataclass and those that its fields hold, also as the values of a dict."""
    held = [kind for hint in get_type_hints(schema).values() for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    return [schema, *(inner for kind in held for inner in dataclasses_of(kind))]


def test_every_key_has_a_meaning():
    schemas = dataclasses_of(Config)
    assert len(schemas) == 11
    for schema in schemas:
        intro, meanings = describe(schema)
        assert intro and set(meanings) == {f.name for f in fields(schema)}, schema
        assert all(len(meaning) > 8 for meaning in meanings.values()), schema
    kinds = {name: kind for name, kind, _, _ in keys(Config)}
    paths = {"run_dir", "init_from", "data.shards", "data.text", "text.encoder"}
    paths |= {"data.mixture.NAME.shards", "data.mixture.NAME.text"}
    assert {name for name, kind in kinds.items() if kind == "a path"} == paths


def test_the_configuration_is_read_without_torch():
    names = ("torch", "PIL", "transformers", "hydra")
    code = f"import sys, train.config, model; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_is_a_library():
    code = """
import torch
from model import Diffusion, UNet, UNetConfig, training_losses
net = UNet(UNetConfig(image_size=8, model_channels=32, norm_groups=8, channel_mult=[1], num_res_blocks=1,
                      attention_resolutions=[], num_head_channels=32, encoder_dim=16, encoder_channels=32,
                      att_pool_heads=2))
x, t, noise, diffusion = torch.zeros(2, 3, 8, 8), torch.tensor([3, 9]), torch.ones(2, 3, 8, 8), Diffusion(10)
x_t = diffusion.q_sample(x, t, noise)
print(sorted(training_losses(diffusion, net(x_t, t, torch.ones(2, 5, 16)), x, x_t, t, noise)))
from model import Unet
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['loss', 'mse', 'vb']"
    assert done.stderr.splitlines()[-1].startswith("ImportError: cannot import name 'Unet'")


def test_every_activation_of_the_configuration_is_there():
    from model.activations import FEW_BIT

    assert ("gelu", *FEW_BIT) == ACTIVATIONS


def write_meta(folder: Path, tokens: int, dim: int) -> str:
    folder.mkdir()
    TextMeta("encoder", "0", "0", tokens, dim, "float16", "float32", "none").write(folder)
    return str(folder)


def test_the_shape_of_the_text_is_that_of_the_embeddings(repo, tmp_path):
    text = write_meta(tmp_path / "text", 16, 64)
    config = load(repo, "+experiment=smoke", f"data.text={text}")
    assert (config.data.tokens, config.model.encoder_dim) == (0, 0)
    with pytest.raises(ValueError, match=r"model.encoder_dim=0: give the width"):
        UNet(config.model)
    assert not resolve_text_shape(config)
    assert (config.data.tokens, config.model.encoder_dim) == (16, 64)
    # What is given stays, and what the net cannot take is refused.
    config = load(repo, "+experiment=smoke", f"data.text={text}", "data.tokens=12")
    resolve_text_shape(config)
    assert (config.data.tokens, config.model.encoder_dim) == (12, 64)
    config = load(repo, "+experiment=smoke", f"data.text={text}", "model.att_pool_heads=5")
    with pytest.raises(ValueError, match=r"model.encoder_dim=64, .* is not divisible by model.att_pool_heads=5"):
        resolve_text_shape(config)


def test_without_embeddings_a_run_is_described_with_those_of_t5_xxl(repo):
    config = load(repo, "+experiment=smoke", "data.text=nowhere")
    assert resolve_text_shape(config)
    assert (config.data.tokens, config.model.encoder_dim) == (77, 4096)
    text = describe_run(load(repo, "+experiment=smoke", "data.text=nowhere"), ranks=1, inputs=None)
    assert "none usable yet" in text and "77 x 4096 assumed, as T5-XXL's" in text
    with pytest.raises(ValueError, match=r"no text embeddings in '.*/nowhere'"):
        resolve_text_shape(load(repo, "+experiment=scenes", "data.text=nowhere"))
