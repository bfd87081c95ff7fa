"""LoRA and DreamBooth of the second stage: what is trained, what diffusers' pipeline makes of it, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file

from data.config import DataConfig
from data.inspect import Inspect, inspect
from data.storage.shards import find_shards
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from tests.checkpoints import random_net, write_checkpoint, write_run
from tests.test_evaluate import NET as FIRST_STAGE
from tests.test_evaluate import assert_one_line
from train import dreambooth, export_lora
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import latest_checkpoint, step_folder
from train.checkpoint.identity import weights_digest
from train.compose import compose_config
from train.config import Config, LoRAConfig
from train.monitor.step_memory import inputs, step_bytes, walk_bytes
from train.sampling.sampler import make_scheduler, sample
from train.weights.diffusers_folder import build_unet
from train.weights.lora import add_lora
from train.weights.trained_net import load_net

NET = UNetConfig(
    image_size=32, low_res_size=8, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[16], num_head_channels=32, encoder_dim=64, encoder_channels=64, att_pool_heads=2,
    scale_skip_connection=True,
)  # fmt: skip
LORA = LoRAConfig(rank=4, alpha=6.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of the second stage and one of the first, on the embeddings of a tiny T5, and pictures of a concept."""
    base = tmp_path_factory.mktemp("tune")
    write_tiny_t5(TinyT5(out=str(base / "t5")))
    (base / "text").mkdir()
    TextMeta(str(base / "t5"), "0", "0", 16, 64, "float32", "float32", "if-1").write(base / "text")
    write_run(base / "run", NET, base / "text")
    write_run(base / "first", FIRST_STAGE, base / "text")
    (base / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(base / "pictures" / f"{i}.png")
    return base


def prepare(base: Path, *arguments: str) -> None:
    """train.dreambooth with these arguments instead of its own."""
    given = [f"checkpoint={base / 'run'}", f"pictures={base / 'pictures'}", "prompt=a zwx toy", f"out={base / 'booth'}"]
    instead = {argument.split("=")[0] for argument in arguments}
    dreambooth.main([argument for argument in given if argument.split("=")[0] not in instead] + list(arguments))


def tuned_run(run_dir: Path, base: Path) -> Path:
    """A run whose only checkpoint has random matrices beside the average of the run in base."""
    unet = random_net(NET, 2)
    base_digest = weights_digest(unet.state_dict())
    add_lora(unet, LORA)
    trained = {name: torch.randn_like(p) / 5 for name, p in unet.named_parameters() if p.requires_grad}
    shapes = {name: list(value.shape) for name, value in trained.items()}
    flat = torch.cat([value.flatten() for value in trained.values()])
    config = Config(
        run_dir=str(run_dir), init_from=str(base / "run"), model=NET, lora=LORA, precision="fp32",
        data=DataConfig(text=str(base / "text")),
    )  # fmt: skip
    write_checkpoint(
        step_folder(run_dir, 5), [{"master": flat, "ema": flat.clone()}], shapes, step=5, schedule_step=5,
        config=asdict(config), text=asdict(TextMeta.read(base / "text")), base=base_digest,
    )  # fmt: skip
    return run_dir


def batch() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    return inputs(NET, 2, 16)


def test_the_matrices_alone_are_trained():
    unet = random_net(NET, 1)
    with torch.no_grad():
        before = unet(*batch())
    add_lora(unet, LORA)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 4 and all(".lora_" in name for name in trained), "of three projections in 4 blocks"
    out = unet(*batch())
    torch.testing.assert_close(out, before, msg="what is added changes nothing yet")
    out.square().mean().backward()
    assert {name for name, p in unet.named_parameters() if p.grad is not None} == trained


@pytest.mark.slow
def test_the_plan_counts_the_bytes_of_its_step():
    unet = random_net(NET, 1)
    add_lora(unet, LORA)
    assert step_bytes(NET, 2, "fp32", accumulated=False, tokens=16, lora=LORA) == walk_bytes(unet, inputs(NET, 2, 16))


def test_diffusers_pipeline_draws_with_the_exported_lora_what_is_drawn_here(base, tmp_path, capsys):
    tuned, out = tuned_run(tmp_path / "tuned", base), tmp_path / "lora"
    export_lora.main([f"checkpoint={tuned}", f"out={out}"])
    assert f"IFSuperResolutionPipeline.load_lora_weights('{out}') adds it to the net of" in capsys.readouterr().out
    before = load_net(Checkpoint.open(base / "run"), "ema", CPU)
    pipeline = IFSuperResolutionPipeline(
        tokenizer=None, text_encoder=None, unet=build_unet(before.state_dict(), NET, torch.float32),
        scheduler=make_scheduler(1000, True, second_stage=True),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon"),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    text, empty, small = torch.randn(2, 77, 64), torch.randn(77, 64), torch.rand(2, 3, 8, 8) * 2 - 1

    def theirs() -> torch.Tensor:
        images = pipeline(
            image=small, prompt_embeds=text, negative_prompt_embeds=empty.expand(2, -1, -1), num_inference_steps=3,
            guidance_scale=4.0, noise_level=250, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        ).images  # fmt: skip
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 255

    def ours(net: torch.nn.Module) -> torch.Tensor:
        scheduler = make_scheduler(1000, True, second_stage=True)
        return sample(net, scheduler, text, empty, 4.0, 3, [4, 5], low_res=small).float()

    without = theirs()
    assert (without - ours(before)).abs().max() < 2
    pipeline.load_lora_weights(out)
    found = ours(load_net(Checkpoint.open(tuned), "ema", CPU))
    assert (theirs() - found).abs().max() < 2 and (without - found).abs().mean() > 2


def test_dreambooth_takes_the_pictures_alone(base, capsys):
    shutil.rmtree(base / "booth", ignore_errors=True)
    prepare(base)
    said = capsys.readouterr()
    assert [path.name for path in (base / "booth").iterdir()] == ["concept"]
    assert sum(shard.count for shard in find_shards(base / "booth" / "concept" / "shards")) == 5
    assert TextMeta.read(base / "booth" / "concept" / "text").dim == 64
    assert "5 pictures of the concept; next, with the net's own model=\n" in said.out
    experiment, begin, *data = said.out.strip().splitlines()[-1].split("main.py ")[1].split()
    config = compose_config([experiment, begin, *data])
    assert [dataset.shards for dataset in config.data.datasets()] == [str(base / "booth" / "concept" / "shards")]
    assert config.model.low_res_size and config.lora.rank and config.data.cond_drop_prob == 0
    assert "enlarged" not in said.err


def test_pictures_that_are_too_small_are_told(base, tmp_path, capsys):
    Image.new("RGB", (31, 90)).save(tmp_path / "narrow.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "enough.png")
    prepare(base, f"pictures={tmp_path}", f"out={tmp_path / 'out'}")
    assert (
        "warning: 1 of 2 pictures are enlarged to 32 px, and the net learns their blur (narrow.png of 31 x 90): give "
        "pictures whose shorter side has 32 px or more\n" in capsys.readouterr().err
    )
    shards = str(tmp_path / "out" / "concept" / "shards")
    for size, told in ((32, True), (31, False)):
        inspect(Inspect(shards, str(tmp_path / "report.html"), image_size=size))
        line = f"images: 1 with a shorter side below image_size={size}: a training enlarges those\n"
        assert (line in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["class_prompt=a toy"], "class_prompt=a toy is for pictures of the class, and '"),
        (["prior=6"], "draws none by itself: leave prior out"),
        (["steps=20"], "steps=20 is for pictures of the class"),
        (["checkpoint={base}/first"], "class_prompt= is empty: give a prompt for the class"),
    ],
)
def test_mistakes_end_in_one_line(base, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        prepare(base, f"out={tmp_path / 'out'}", *(argument.format(base=base) for argument in arguments))
    assert_one_line(caught, capsys, message)
    assert not (tmp_path / "out").exists()


def train(repo: Path, base: Path) -> None:
    model = [f"model.{name}={value}".replace(" ", "") for name, value in asdict(NET).items()]
    data = [f"data.mixture.concept.{kind}={base / 'booth' / 'concept' / kind}" for kind in ("shards", "text")]
    program = [
        sys.executable, str(repo / "train" / "main.py"), "+experiment=finetune_dreambooth_ii", "model=small", *model,
        *data, f"init_from={base / 'run'}", f"run_dir={base / 'tuned'}", "steps=6", "save_every=3", "log_every=1",
        "precision=fp32", "optim.warmup_steps=2", "optim.lr_peak=1e-2", "sample.steps=2", "wandb.mode=disabled",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(program, cwd=base, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_it_is_tuned_and_goes_on_where_it_was(repo, base):
    prepare(base)
    train(repo, base)
    tuned = base / "tuned"
    whole = load_file(latest_checkpoint(tuned) / "rank-00000.safetensors")
    losses = [json.loads(line)["loss"] for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    weights = Checkpoint.open(tuned).weights("master")
    assert all(".lora_" in name for name in weights) and len(weights) == 24, "the frozen net is not saved again"
    assert min(v.abs().max() for n, v in weights.items() if ".lora_B." in n) > 1e-4, "every matrix has been trained"
    args = batch()
    with torch.no_grad():
        ours, before = (load_net(Checkpoint.open(run), "ema", CPU)(*args) for run in (tuned, base / "run"))
    assert (ours - before).abs().max() > 1e-3
    assert Image.open(tuned / "samples" / "step-00000006.png").size[1] > 2 * 32, "the small images, and a scale"

    latest_checkpoint(tuned).rename(base / "aside")
    (tuned / "done").unlink(missing_ok=True)
    train(repo, base)
    again = load_file(latest_checkpoint(tuned) / "rank-00000.safetensors")
    assert torch.equal(again["master"], whole["master"]) and torch.equal(again["ema"], whole["ema"])
    assert losses == [json.loads(line)["loss"] for line in (tuned / "metrics.jsonl").read_text().splitlines()]
