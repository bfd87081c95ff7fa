"""train.sample through both stages: what it draws, as diffusers does; what it writes; which pairs it refuses."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from data.text.encoder import TextEncoder
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.convert import diffusers_config, to_diffusers
from tests.checkpoints import changed_run, random_net, write_run
from train.checkpoint.checkpoint import Checkpoint
from train.evaluation.nearest import read_images
from train.sample import main
from train.sampling import cascade, output
from train.sampling import prompts as find
from train.sampling.cascade import draw_stages, first_stage, second_stage
from train.sampling.output import write_samples
from train.sampling.prompts import Prompts
from train.sampling.sampler import SCHEDULERS, make_scheduler, sample
from train.sampling.steps_sheet import GAP, LINE
from train.weights.trained_net import load_net

FIRST = UNetConfig(
    image_size=8, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[4],
    num_head_channels=32, encoder_dim=32, encoder_channels=32, att_pool_heads=2,
)  # fmt: skip
SECOND = replace(FIRST, image_size=16, low_res_size=8, attention_resolutions=[8], scale_skip_connection=True)
PROMPT = "a red circle left of a blue square"
QUICK = [f"prompt={PROMPT}", "n=2", "steps=5", "seed=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An encoder, runs of both stages, and runs that do not fit."""
    base = tmp_path_factory.mktemp("cascade")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=FIRST.encoder_dim, layers=1))
    text = base / "text"
    TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu")).meta("float16").write(text)
    write_run(base / "first", FIRST, text)
    write_run(base / "second", SECOND, text)
    changed_run(base / "second", base / "of_4_px", lambda m: m["config"]["model"].update(low_res_size=4))
    changed_run(base / "second", base / "other_encoder", lambda m: m["text"].update(weights_sha256="0", tokens=24))
    changed_run(base / "second", base / "stored_otherwise", lambda m: m["text"].update(dtype="float32"))
    changed_run(base / "second", base / "of_250", lambda m: m["config"].update(diffusion_steps=250))
    changed_run(
        base / "second", base / "of_lora", lambda m: m["config"].update(init_from="gone", lora={"rank": 2, "alpha": 2})
    )
    return base


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(base: Path, out: str, *arguments: str) -> Path:
    main([f"checkpoint={base / 'first'}", f"out={out}", *QUICK, *arguments])
    return Path(out)


def through_both(base: Path, out: str, *arguments: str) -> Path:
    return draw(base, out, f"second={base / 'second'}", "second_steps=5", *arguments)


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "sample.json").read_text())["images"]


def pixels(folder: Path, key: str = "file") -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / image[key])) for image in listed(folder)]).astype(int)


def pipeline(kind: type, config, **options: object) -> IFPipeline | IFSuperResolutionPipeline:
    """A pipeline of diffusers with the average of a run that write_run wrote."""
    unet = UNet2DConditionModel(**diffusers_config(config))
    unet.load_state_dict(to_diffusers(random_net(config, 2).state_dict(), config))
    made = kind(
        tokenizer=None, text_encoder=None, unet=unet, scheduler=make_scheduler(1000, True, **options.pop("scheduler")),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False, **options,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def test_both_stages_draw_what_diffusers_two_pipelines_draw(base):
    encoder = TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu"))
    text, empty = torch.from_numpy(encoder([PROMPT, ""])).split(1)

    def options() -> dict:
        return {
            "prompt_embeds": text.expand(2, -1, -1), "negative_prompt_embeds": empty.expand(2, -1, -1),
            "generator": [torch.Generator().manual_seed(seed) for seed in (4, 5)], "output_type": "pt",
        }  # fmt: skip

    small = pipeline(IFPipeline, FIRST, scheduler={})(**options(), num_inference_steps=5).images
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    second = pipeline(
        IFSuperResolutionPipeline, SECOND, image_noising_scheduler=noising, scheduler={"second_stage": True}
    )
    large = second(image=small, num_inference_steps=4, noise_level=250, **options()).images
    drawn = through_both(base, "both", "second_steps=4")
    assert pixels(drawn).std() > 10 and pixels(drawn).shape == (2, 16, 16, 3)
    for theirs, key in ((small, "small"), (large, "file")):
        assert abs((theirs.permute(0, 2, 3, 1).numpy() + 1) * 127.5 - pixels(drawn, key)).max() < 1
    # The floats are nearer than the levels of 255, which must not be what goes from stage to stage.
    first = first_stage(Checkpoint.open(base / "first"), 7.0, "5", "ddpm")
    stages = [first, second_stage(Checkpoint.open(base / "second"), first.checkpoint, 4.0, "4", 0.25)]
    found = draw_stages(
        stages, "ema", torch.device("cpu"), Prompts([PROMPT], text, empty[0]), [4, 5], 2, "", [lambda step: None] * 2
    )
    for theirs, ours in zip((small, large), found, strict=True):
        assert (theirs - ours).abs().max() < 1e-4


def test_the_small_images_are_those_of_the_first_stage_alone(base, capsys):
    alone, both = draw(base, "one"), through_both(base, "both", "aug_level=0.1")
    assert np.array_equal(pixels(alone), pixels(both, "small"))
    assert {path.name for path in both.iterdir()} == {
        "grid.png", "sample.json", "small", "000-seed-4.png", "000-seed-5.png"
    }  # fmt: skip
    assert {path.name for path in (both / "small").iterdir()} == {"000-seed-4.png", "000-seed-5.png"}
    assert read_images(both).shape == (2, 3, 16, 16) and read_images(both / "small").shape == (2, 3, 8, 8)
    grids = [Image.open(folder / "grid.png").size for folder in (alone, both)]
    assert grids[0][0] == grids[1][0] and grids[1][1] == 2 * grids[0][1], "a row more"
    said = capsys.readouterr()
    assert "second stage: step 7, ema, ddpm 5 steps, guidance 4, aug_level 0.1, seeds 4 to 5" in said.out
    assert "2 large images: 10 of 10 steps (100 %)" in said.err
    told = json.loads((both / "sample.json").read_text())
    assert told["second"] == {
        "checkpoint": "step-00000007", "step": 7, "run_dir": str(base / "second"), "guidance_scale": 4.0, "steps": "5",
        "scheduler": "ddpm", "aug_level": 0.1,
    }  # fmt: skip
    assert (told["run_dir"], told["guidance_scale"], told["steps"]) == (str(base / "first"), 7.0, "5")
    of_one = json.loads((alone / "sample.json").read_text())
    assert of_one["second"] is None and not {"aug_level", "second_steps", "second_guidance_scale"} & of_one.keys()


def test_each_argument_of_the_second_stage_counts(base):
    first = first_stage(Checkpoint.open(base / "first"), 7.0, "2", "ddpm")
    text = torch.randn(3, 77, FIRST.encoder_dim, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(["a", "b"], text[:2], text[2])

    def large(
        name: str = "second", scale: float = 4.0, steps: str = "2", aug_level: float = 0.25, weights: str = "ema",
        micro_batch: int = 2,
    ) -> Tensor:  # fmt: skip
        second = second_stage(Checkpoint.open(base / name), first.checkpoint, scale, steps, aug_level)
        watch = [lambda step: None] * 2
        cpu, seeds = torch.device("cpu"), [4, 5]
        *_, drawn = draw_stages([first, second], weights, cpu, prompts, seeds, micro_batch, "", watch)
        return drawn

    plain = large()
    assert plain.shape == (2, 3, 16, 16) and plain.abs().max() <= 1
    for changed in ({"scale": 1.0}, {"steps": "3"}, {"aug_level": 0.5}, {"weights": "master"}):
        assert (large(**changed) - plain).abs().max() > 0.05, changed
    assert (large(micro_batch=1) - plain).abs().max() < 1e-2, "an image does not depend on the others"
    assert torch.equal(large("stored_otherwise"), plain), "the same encoder's states in another form"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_the_first_stage_hands_on_is_within_the_range_of_images(base, scheduler):
    """Without a clamp: the last step of each scheduler ends at the thresholded prediction."""
    first = first_stage(Checkpoint.open(base / "first"), 7.0, "4", scheduler)
    text, steps = torch.randn(2, 77, FIRST.encoder_dim), []
    prompts = Prompts(["a"], text[:1], text[1])
    (small,) = draw_stages([first], "ema", torch.device("cpu"), prompts, [4], 1, "", [steps.append])
    assert small.abs().max() <= 1 < steps[-1].x_t.abs().max()
    assert torch.equal(small, steps[-1].pred_xstart)


def test_small_images_of_another_size_are_refused(base):
    net, text = load_net(Checkpoint.open(base / "second"), "ema", torch.device("cpu")), torch.randn(1, 77, 32)
    scheduler = make_scheduler(1000, True, second_stage=True)
    for low_res, given in ((None, 0), (torch.zeros(1, 3, 4, 4), 4)):
        with pytest.raises(ValueError, match=f"low_res is of {given} px, and the net's model.low_res_size is 8"):
            sample(net, scheduler, text, text[0], 1.0, 2, [4], low_res=low_res)


def test_the_grid_of_long_strips_ends_at_a_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "GRID", 8)
    stages = [np.zeros((12, 3, size, size), np.uint8) for size in (4, 8)]
    found = []
    monkeypatch.setattr(output, "plot_grid", lambda images, *rest: found.append((len(images), rest[3])))
    write_samples(tmp_path, stages, [f"caption {i}" for i in range(12)], [0] * 12, "", {}, strips=True)
    assert found == [(8, 4)] and len(list(tmp_path.glob("*.png"))) == 12


def test_the_empty_prompt_is_guided_in_neither_stage(base):
    drawn = through_both(base, "empty", "prompt=", f"encoder={base / 't5'}", "n=1", "steps=2", "second_steps=2")
    told = json.loads((drawn / "sample.json").read_text())
    assert told["guidance_scale"] == told["second"]["guidance_scale"] == 1


def test_strips_and_sheets_of_steps_go_through_both_with_one_net_at_a_time(base, monkeypatch):
    nets, load = [], cascade.load_net

    def watched(*arguments: object) -> object:
        assert all(net() is None for net in nets), "the first net is gone before the second one is loaded"
        net = load(*arguments)
        nets.append(weakref.ref(net))
        return net

    monkeypatch.setattr(cascade, "load_net", watched)
    strip = through_both(base, "strip", "to=two squares", "strip=3", "n=1", "steps_sheet=true")
    assert len(nets) == 2
    assert [image["seed"] for image in listed(strip)] == [4, 4, 4] and pixels(strip).shape == (3, 16, 16, 3)
    assert (abs(np.diff(pixels(strip), axis=0)).max(axis=(1, 2, 3)) > 2).all(), "each has text states of its own"
    read = read_images(strip)  # by train.neighbours
    assert read.shape == (3, 3, 16, 16) and (strip / "steps.png").exists()
    sheet = np.asarray(Image.open(strip / "second_steps.png").convert("RGB")).astype(int)
    first = np.asarray(Image.open(strip / "000-seed-4.png").resize((96, 96), Image.Resampling.NEAREST)).astype(int)
    left, below = GAP + 4 * (96 + GAP), sheet.shape[0] - GAP - LINE - 96
    assert abs(sheet[below : below + 96, left : left + 96] - first).max() <= 1, "the last prediction is the picture"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint={base}/second second={base}/second", "give a checkpoint of the first stage as checkpoint=, and"),
        ("checkpoint={base}/second", "is of the second stage, which enlarges the images"),
        (
            "second={base}/first",
            "is of the first stage: give a checkpoint of the second, such as one of +experiment=if_ii_l",
        ),
        ("second={base}/of_4_px", "enlarges images of 4 px, checkpoint='{base}/first/checkpoints/step-00000007' draws"),
        ("second={base}/other_encoder", "on text states of another weights_sha256, tokens than checkpoint='{base}"),
        ("second={base}/absent", "/absent' has no whole checkpoint"),
        ("second={base}/of_250", "error: second_steps=smart50 is made for ddpm and 1000"),
        ("second={base}/of_lora", "/gone': name a file or folder on this machine"),
        ("second={base}/second second_steps=1", "error: second_steps=1 must lie between 2 and the 1000"),
        ("second={base}/second second_guidance_scale=-1", "second_guidance_scale=-1.0 must be at least 0"),
        ("second={base}/second aug_level=1", "aug_level=1.0 must be at least 0 and less than 1"),
        ("second={base}/second ema_length=0.1", "tracked no power-function averages (ema_snapshot_every=0)"),
        ("second_steps=27", "second_steps=27 is of the second stage: give second="),
        ("aug_level=0.3", "aug_level=0.3 is of the second stage: give second="),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    base, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(find, "load_encoder", None)
    monkeypatch.setattr(cascade, "load_net", None)
    with pytest.raises(SystemExit) as caught:
        draw(base, "out", *arguments.format(base=base).split())
    error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and error[-1].startswith("error: ") and message.format(base=base) in error[-1]
    assert len(error) == 1 and not list(tmp_path.iterdir())
