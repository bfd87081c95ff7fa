"""A training of the second stage: as the first in order, ranks and resume; what it draws."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from model.config import UNetConfig
from model.convert import diffusers_config, to_diffusers
from tests.checkpoints import random_net
from tests.support.trainings import launch, make_data, metrics
from train.checkpoint.checkpoint import Checkpoint
from train.compose import compose_config
from train.monitor.rank_memory import needed_bytes
from train.sampling.sampler import make_scheduler, sample
from train.summary import describe

NET = UNetConfig(
    image_size=16, low_res_size=4, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[8], num_head_channels=32, encoder_dim=24, encoder_channels=32, att_pool_heads=2,
    scale_skip_connection=True,
)  # fmt: skip
# What makes the experiment a training of seconds.
SMALL = [
    "+experiment=scenes_ii", "steps=4", "global_batch=8", "micro_batch=4", "save_every=2", "log_every=1",
    "validate_every=2", "check_every=2", "optim.warmup_steps=2", "data.workers=1", "data.streams=4",
    "data.validation.samples=6", "sample.every=0", "sample.steps=2", "sample.prompts=3", "model.image_size=32",
    "model.low_res_size=8", "model.channel_mult=[1,2]", "model.attention_resolutions=[16]", "model.att_pool_heads=2",
]  # fmt: skip


def test_the_experiments_are_as_the_readme_says():
    for name in ("if_ii_l", "if_ii_m"):
        config = compose_config([f"+experiment={name}"])
        assert (config.global_batch, config.steps, config.diffusion_steps) == (1536, 2_500_000, 1000)
        assert (config.model.low_res_size, config.model.image_size) == (64, 256)
        assert config.data.streams == config.global_batch
        assert (config.optim.name, config.precision, config.model.activation) == ("adamw8bit", "bf16", "gelu_3bit")
    assert "482,483,334 parameters, 64 -> 256 px, bf16" in describe(config, 256, None)


def test_captions_without_images_are_refused():
    with pytest.raises(ValueError, match=r"captions of your own, which have no images .* give a number of captions"):
        compose_config(["+experiment=scenes_ii", "sample.prompts=[a red circle]"])


def test_its_small_images_count_in_the_memory_of_a_rank():
    config = compose_config(["+experiment=scenes_ii", "data.tokens=4", "model.encoder_dim=384"])
    without = replace(config, model=replace(config.model, low_res_size=0))
    found, first = (needed_bytes(one, 1, 10**6, 0, on_gpu=True)[1] for one in (config, without))
    assert (found - first) % (3 * 16**2) == 0 < found - first


def test_it_draws_what_diffusers_pipeline_draws():
    net = random_net(NET, 1)
    unet = UNet2DConditionModel(**diffusers_config(NET))
    unet.load_state_dict(to_diffusers(net.state_dict(), NET))
    pipeline = IFSuperResolutionPipeline(
        tokenizer=None, text_encoder=None, unet=unet, scheduler=make_scheduler(1000, True, second_stage=True),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon"),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.sample_max_value == 1.0
    torch.manual_seed(0)
    text, empty, small = torch.randn(2, 77, 24), torch.randn(77, 24), torch.rand(2, 3, 4, 4) * 2 - 1
    scheduler = make_scheduler(1000, True, second_stage=True)
    expected = pipeline(
        image=small, prompt_embeds=text, negative_prompt_embeds=empty.expand(2, -1, -1), num_inference_steps=5,
        guidance_scale=4.0, noise_level=250, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
    ).images  # fmt: skip
    found = sample(net, scheduler, text, empty, 4.0, 5, [4, 5], low_res=small)
    assert found.float().std() > 10
    assert (torch.from_numpy(expected).permute(0, 3, 1, 2) * 255 - found).abs().max() < 2
    other = sample(net, scheduler, text, empty, 4.0, 5, [4, 5], low_res=small.flip(3))
    assert not torch.equal(found, other), "the small image counts"
    (alone,) = sample(net, scheduler, text[1:], empty, 4.0, 5, [5], low_res=small[1:])
    assert (alone.int() - found[1].int()).abs().max() < 2, "an image does not depend on the others"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def trained(repo: Path, data: Path, run_dir: Path, *more: str, ranks: int) -> Path:
    """A run of SMALL, validated on what it is trained on."""
    held_out = [f"data.validation.{name}={data / name}" for name in ("shards", "text")]
    done = launch(repo, data, run_dir, *SMALL, *held_out, *more, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(repo, data, tmp_path_factory) -> Path:
    return trained(repo, data, tmp_path_factory.mktemp("runs") / "two", ranks=2)


LOSSES = ("loss", "mse", "vb")


@pytest.mark.slow
def test_one_rank_gives_the_curve_and_validation_of_two(repo, data, two_ranks, tmp_path):
    one, two = metrics(trained(repo, data, tmp_path / "one", ranks=1)), metrics(two_ranks)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for alone, both in zip(one, two, strict=True):
        for name in LOSSES:
            assert alone[name] == pytest.approx(both[name], rel=2e-3), (alone["step"], name)
    for name in ("validation/mse", "validation/mse_e0", "validation/mse_e7"):
        assert one[-1][name] == pytest.approx(two[-1][name], rel=2e-3), name
    grid = Image.open(two_ranks / "samples" / "step-00000004.png")
    assert grid.size[1] > 3 * 32, "the small images, and two scales"


@pytest.mark.slow
def test_it_resumes_bit_identically(repo, data, two_ranks, tmp_path):
    run_dir = tmp_path / "again"
    shutil.copytree(two_ranks, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    trained(repo, data, run_dir, ranks=2)
    assert [[line[n] for n in LOSSES] for line in metrics(run_dir)] == [
        [line[n] for n in LOSSES] for line in metrics(two_ranks)
    ]
    for rank in range(2):
        file = f"checkpoints/step-00000004/rank-{rank:05d}.safetensors"
        before, after = load_file(two_ranks / file), load_file(run_dir / file)
        assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    checkpoint = Checkpoint.open(run_dir)
    assert checkpoint.model.low_res_size == 8
    assert {"aug_proj.0.weight", "input_blocks.0.0.weight"} <= checkpoint.weights("ema").keys()
