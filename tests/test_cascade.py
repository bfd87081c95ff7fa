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

from data.text.encoder import TextEncoder
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.convert import diffusers_config, to_diffusers
from tests.checkpoints import changed_run, random_net, write_run
from train.evaluation.nearest import read_images
from train.sample import main
from train.sampling import cascade
from train.sampling.sampler import PRESETS, make_scheduler

FIRST = UNetConfig(
    image_size=8, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[4],
    num_head_channels=32, encoder_dim=32, encoder_channels=32, att_pool_heads=2,
)  # fmt: skip
SECOND = replace(FIRST, image_size=16, low_res_size=8, attention_resolutions=[8], scale_skip_connection=True)
PROMPT = "a red circle left of a blue square"
QUICK = [f"prompt={PROMPT}", "n=2", "steps=5", "seed=4", "second_steps=5"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An encoder, runs of both stages, and runs that do not fit."""
    base = tmp_path_factory.mktemp("cascade")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=FIRST.encoder_dim, layers=1))
    text = base / "text"
    TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu")).meta("float16").write(text)
    write_run(base / "first", FIRST, text)
    write_run(base / "second", SECOND, text)
    write_run(base / "of_4_px", replace(SECOND, low_res_size=4), text)
    changed_run(base / "second", base / "other_encoder", lambda m: m["text"].update(weights_sha256="0", tokens=24))
    changed_run(base / "second", base / "stored_otherwise", lambda m: m["text"].update(dtype="float32"))
    changed_run(base / "second", base / "of_250", lambda m: m["config"].update(diffusion_steps=250))
    return base


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(base: Path, out: str, *arguments: str) -> Path:
    main([f"checkpoint={base / 'first'}", f"out={out}", *QUICK, *arguments])
    return Path(out)


def through_both(base: Path, out: str, *arguments: str) -> Path:
    return draw(base, out, f"second={base / 'second'}", *arguments)


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


@pytest.mark.parametrize("steps", ["5", "smart27"])
def test_both_stages_draw_what_diffusers_two_pipelines_draw(base, steps):
    encoder = TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu"))
    text, empty = torch.from_numpy(encoder([PROMPT, ""])).split(1)

    def options() -> dict:
        return {
            "prompt_embeds": text.expand(2, -1, -1), "negative_prompt_embeds": empty.expand(2, -1, -1),
            "generator": [torch.Generator().manual_seed(seed) for seed in (4, 5)],
        }  # fmt: skip

    small = pipeline(IFPipeline, FIRST, scheduler={})(**options(), num_inference_steps=5, output_type="pt").images
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    second = pipeline(
        IFSuperResolutionPipeline, SECOND, image_noising_scheduler=noising, scheduler={"second_stage": True}
    )
    taken = {"timesteps": PRESETS[steps]} if steps in PRESETS else {"num_inference_steps": int(steps)}
    large = second(image=small, noise_level=250, output_type="np", **taken, **options()).images
    drawn = through_both(base, "both", f"second_steps={steps}")
    assert pixels(drawn).std() > 10 and pixels(drawn).shape == (2, 16, 16, 3)
    # With a net of random weights half a level of 255 in the small image would be several in the large one.
    assert abs(large * 255 - pixels(drawn)).max() < 1
    first = ((small.permute(0, 2, 3, 1).numpy() + 1) * 127.5).clip(0, 255)
    assert abs(first - pixels(drawn, "small")).max() < 1


def test_the_small_images_are_those_of_the_first_stage_alone(base, capsys):
    alone, both = draw(base, "one", "second_steps=smart50"), through_both(base, "both")
    assert np.array_equal(pixels(alone), pixels(both, "small"))
    assert {path.name for path in both.iterdir()} == {
        "grid.png", "sample.json", "small", "000-seed-4.png", "000-seed-5.png"
    }  # fmt: skip
    assert {path.name for path in (both / "small").iterdir()} == {"000-seed-4.png", "000-seed-5.png"}
    assert read_images(both).shape == (2, 3, 16, 16) and read_images(both / "small").shape == (2, 3, 8, 8)
    grids = [Image.open(folder / "grid.png").size for folder in (alone, both)]
    assert grids[0][0] == grids[1][0] and grids[1][1] == 2 * grids[0][1], "a row more"
    said = capsys.readouterr()
    assert "second stage: step 7, ema, ddpm 5 steps, guidance 4, aug_level 0.25, seeds 4 to 5" in said.out
    assert "2 large images: 10 of 10 steps (100 %)" in said.err


def test_the_record_has_both_stages(base):
    told = json.loads((through_both(base, "both", "aug_level=0.1") / "sample.json").read_text())
    assert told["second"] == {
        "checkpoint": "step-00000007", "step": 7, "run_dir": str(base / "second"), "guidance_scale": 4.0, "steps": "5",
        "scheduler": "ddpm", "aug_level": 0.1,
    }  # fmt: skip
    assert (told["run_dir"], told["guidance_scale"], told["steps"]) == (str(base / "first"), 7.0, "5")
    alone = json.loads((draw(base, "one", "second_steps=smart50") / "sample.json").read_text())
    assert alone["second"] is None and not {"aug_level", "second_steps", "second_guidance_scale"} & alone.keys()


def test_each_argument_of_the_second_stage_changes_its_images_alone(base):
    plain = through_both(base, "plain")
    assert abs(pixels(through_both(base, "batches", "micro_batch=1")) - pixels(plain)).max() <= 1
    for argument in ("second_guidance_scale=1", "second_steps=6", "aug_level=0.5"):
        changed = through_both(base, argument, argument)
        assert np.array_equal(pixels(changed, "small"), pixels(plain, "small")), argument
        assert abs(pixels(changed) - pixels(plain)).max() > 5, argument
    masters = through_both(base, "masters", "weights=master")
    assert abs(pixels(masters) - pixels(plain)).max() > 5 < abs(pixels(masters, "small") - pixels(plain, "small")).max()


def test_strips_and_sheets_of_steps_go_through_both(base):
    strip = through_both(base, "strip", "to=two squares", "strip=3", "n=1", "steps_sheet=true")
    assert [image["seed"] for image in listed(strip)] == [4, 4, 4] and pixels(strip).shape == (3, 16, 16, 3)
    assert abs(pixels(strip)[:1] - pixels(through_both(base, "alone", "n=1"))).max() <= 1
    assert (strip / "steps.png").exists() and (strip / "second_steps.png").exists()
    assert read_images(strip).shape == (3, 3, 16, 16), "the sheets are none of the images"


def test_the_first_net_is_gone_before_the_second_is_loaded(base, monkeypatch):
    nets, load = [], cascade.load_net

    def watched(*arguments: object) -> object:
        assert all(net() is None for net in nets)
        net = load(*arguments)
        nets.append(weakref.ref(net))
        return net

    monkeypatch.setattr(cascade, "load_net", watched)
    through_both(base, "both", "steps_sheet=true")
    assert len(nets) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint={base}/second second={base}/second", "give a checkpoint of the first stage as checkpoint=, and"),
        ("checkpoint={base}/second second_steps=smart50", "is of the second stage, which enlarges the images"),
        ("second={base}/first", "is of the first stage: give a checkpoint of a net that has a model.low_res_size"),
        ("second={base}/of_4_px", "enlarges images of 4 px, checkpoint='{base}/first/checkpoints/step-00000007' draws"),
        ("second={base}/other_encoder", "on text states of another weights_sha256, tokens than checkpoint='{base}"),
        ("second={base}/absent", "/absent' has no whole checkpoint"),
        ("second={base}/of_250 second_steps=smart50", "error: second_steps=smart50 is made for ddpm and 1000"),
        ("second={base}/second second_steps=1", "error: second_steps=1 must lie between 2 and the 1000"),
        ("second={base}/second second_guidance_scale=-1", "second_guidance_scale=-1.0 must be at least 0"),
        ("second={base}/second aug_level=1", "aug_level=1.0 must be at least 0 and less than 1"),
        ("second={base}/second ema_length=0.1", "tracked no power-function averages (ema_snapshot_every=0)"),
        ("second_steps=27", "second_steps=27 is of the second stage: give second="),
        ("second_steps=smart50 aug_level=0.3", "aug_level=0.3 is of the second stage: give second="),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    base, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr("data.text.encoder.load_encoder", None)
    monkeypatch.setattr(cascade, "load_net", None)
    with pytest.raises(SystemExit) as caught:
        draw(base, "out", *arguments.format(base=base).split())
    error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and error[-1].startswith("error: ") and message.format(base=base) in error[-1]
    assert len(error) == 1 and not list(tmp_path.iterdir())


def test_another_form_of_the_stored_states_is_no_other_encoder(base):
    other = draw(base, "other", f"second={base / 'stored_otherwise'}")
    assert np.array_equal(pixels(other), pixels(through_both(base, "both")))
