"""train.sample: the pictures it writes, what they depend on and what not; the schedulers against closed forms."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data import demo
from data.config import DataConfig
from data.embed import Embed, embed
from data.text.embeddings import read_empty
from data.text.encoder import TextEncoder
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.diffusion import Diffusion
from model.unet import TextState, UNet
from tests.checkpoints import changed_run, opened_manifests, random_net, write_run
from tests.test_export import NET, TIMESTEPS
from train.checkpoint.checkpoint import Checkpoint
from train.config import SampleConfig
from train.evaluation.evaluated_net import find_net, open_nets
from train.evaluation.nearest import read_images
from train.export import Export, export
from train.sample import Sample, main, run
from train.sampling.sampler import (
    PRESETS,
    SCHEDULERS,
    SamplingStep,
    make_scheduler,
    sample,
    sample_batches,
    set_steps,
    to_pixels,
)
from train.sampling.steps_sheet import GAP, LINE, StepsSheet
from train.weights.trained_net import load_net, sampling_dtype

QUICK = ["n=3", "steps=5", "guidance_scale=3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run with one checkpoint, its data, its encoder."""
    base = tmp_path_factory.mktemp("sample")
    demo.main([f"out={base / 'shards'}", "samples=24", "shard_size=12"])
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=NET.encoder_dim))
    embed(Embed(str(base / "shards"), str(base / "text"), str(base / "t5"), 77, "float32", "float32"))
    write_run(
        base / "run", NET, base / "text", diffusion_steps=TIMESTEPS, sample=SampleConfig(prompts=2),
        data=DataConfig(str(base / "shards"), str(base / "text")),
    )  # fmt: skip
    return base


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(base: Path, *arguments: str) -> Path:
    before = set(Path("samples").glob("*"))
    main([f"checkpoint={base / 'run'}", *QUICK, *arguments])
    (out,) = set(Path("samples").glob("*")) - before
    return out


def pixels(folder: Path) -> Tensor:
    files = [image["file"] for image in json.loads((folder / "sample.json").read_text())["images"]]
    return torch.stack([torch.from_numpy(np.asarray(Image.open(folder / file)).copy()).int() for file in files])


def test_a_prompt_becomes_a_grid_and_single_images(base, capsys):
    out = draw(base, "prompt=a cat: red, [two] # ${x}", "seed=5")
    assert out == Path("samples/0001") and "samples/0001/grid.png" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "grid.png", "sample.json", "000-seed-5.png", "000-seed-6.png", "000-seed-7.png"
    }  # fmt: skip
    told = json.loads((out / "sample.json").read_text())
    assert told["images"][1] == {"file": "000-seed-6.png", "caption": "a cat: red, [two] # ${x}", "seed": 6}
    assert (told["step"], told["steps"], told["guidance_scale"], told["scheduler"]) == (7, "5", 3.0, "ddpm")
    assert Image.open(out / "grid.png").size[0] > 300
    images = pixels(out)
    assert images.shape == (3, 16, 16, 3) and images.float().std() > 10
    again = draw(base, "prompt=a cat: red, [two] # ${x}", "seed=5")
    assert again == Path("samples/0002") and torch.equal(pixels(again), images)
    assert not torch.equal(pixels(draw(base, "prompt=a dog", "seed=5")), images)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(base, scheduler):
    at_once = pixels(draw(base, "prompt=a cat", f"scheduler={scheduler}", "n=5", "micro_batch=5"))
    assert len(np.unique(at_once.numpy(), axis=0)) == 5, "each has a seed of its own"
    for arguments, part in (("n=5 micro_batch=2", slice(0, 5)), ("n=1 seed=3", slice(3, 4))):
        few = pixels(draw(base, "prompt=a cat", f"scheduler={scheduler}", *arguments.split()))
        assert (few - at_once[part]).abs().max() <= 1, "rounding to a level of 255"
        assert (few != at_once[part]).float().mean() < 1e-2


def test_stored_embeddings_and_the_encoder_give_the_same_image(base):
    prompt = "two red circles"
    encoder = TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu"))
    np.save("stored.npy", encoder([prompt, ""])[:1])
    by_prompt = pixels(draw(base, f"prompt={prompt}"))
    assert torch.equal(pixels(draw(base, "embeddings=stored.npy")), by_prompt)
    np.save("one.npy", encoder([prompt, ""])[0].astype(np.float64))
    assert torch.equal(pixels(draw(base, "embeddings=one.npy")), by_prompt)


def test_without_a_prompt_the_captions_of_the_run_are_drawn(base):
    out = draw(base, "n=2")
    images = json.loads((out / "sample.json").read_text())["images"]
    assert [image["seed"] for image in images] == [0, 1, 2, 3]
    captions = [image["caption"] for image in images]
    assert captions[0] == captions[1] != captions[2] == captions[3]
    expected = pixels(draw(base, f"prompt={captions[2]}", "n=2", "seed=2"))
    assert (pixels(out)[2:] - expected).abs().max() <= 1


def test_the_empty_prompt_needs_no_encoder_and_is_not_guided(base):
    stored = pixels(draw(base, "prompt="))
    assert stored.float().std() > 10
    assert (pixels(draw(base, "prompt=  ", f"encoder={base / 't5'}")) - stored).abs().max() <= 1
    assert (pixels(draw(base, "prompt=", "guidance_scale=9")) - stored).abs().max() <= 1
    assert (pixels(draw(base, "prompt=", "scheduler=ddim")) - pixels(
        draw(base, "prompt=a cat", "guidance_scale=0", "scheduler=ddim")
    )).abs().max() <= 1  # fmt: skip


def test_the_steps_of_every_image_are_counted(base, capsys):
    draw(base, "prompt=a red circle", "n=3", "steps=4", "micro_batch=2")
    said = capsys.readouterr().err
    assert "3 images: 12 of 12 steps (100 %)" in said


def test_what_is_beyond_the_tokens_is_named(base, capsys):
    prompt = " ".join(["red"] * 200 + ["giraffe"])
    draw(base, f"prompt={prompt}")
    warning = capsys.readouterr().err
    assert "of which the net takes 76; left out: 'red" in warning and "giraffe'; kept: 'red" in warning
    draw(base, "prompt=a red circle")
    assert "left out" not in capsys.readouterr().err


def test_words_that_the_cleaning_cuts_away_are_named(base, capsys):
    draw(base, "prompt=a xyz123 circle")
    said = capsys.readouterr().err
    assert "warning: caption cleaning ('if-1') removes 'xyz123' from the prompt 'a xyz123 circle'" in said
    assert "the net is given 'a circle'" in said
    draw(base, "prompt=a red circle")
    assert "warning" not in capsys.readouterr().err


def test_a_strip_goes_from_one_prompt_to_another_with_the_same_noise(base, capsys):
    encoder = TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu"))
    start, end = encoder(["a red circle", "two xyz123 squares"])
    strip = draw(base, "prompt=a red circle", "to=two xyz123 squares", "strip=3", "n=2", "seed=5")
    assert "removes 'xyz123'" in capsys.readouterr().err, "the second prompt is looked at too"
    told = json.loads((strip / "sample.json").read_text())
    assert [image["seed"] for image in told["images"]] == [5, 6] * 3
    assert [image["file"] for image in told["images"]][:3] == ["000-seed-5.png", "000-seed-6.png", "001-seed-5.png"]
    captions = [image["caption"] for image in told["images"]][::2]
    assert captions == ["a red circle", "50% of the way", "two xyz123 squares"]
    drawn = pixels(strip)
    for place, states in ((1, (start + end) / 2), (2, end)):
        np.save("states.npy", states)
        alone = pixels(draw(base, "embeddings=states.npy", "n=2", "seed=5"))
        assert (drawn[2 * place : 2 * place + 2] - alone).abs().max() <= 1, place
    assert (drawn[:2] - drawn[-2:]).abs().max() > 5
    width, height = Image.open(strip / "grid.png").size
    assert width > height and not (strip / "steps.png").exists(), "two rows of three"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_steps_of_a_picture_begin_at_its_noise_and_end_at_it(base, scheduler):
    made, sheet = make_scheduler(TIMESTEPS, True, scheduler), StepsSheet()
    text, empty = torch.randn(2, 77, NET.encoder_dim), torch.randn(77, NET.encoder_dim)
    x_start = sample_batches(trained_net(base), made, text, empty, 3.0, 5, [4, 5], 1, watch=sheet)
    drawn = to_pixels(x_start).numpy().astype(int)
    assert sheet.timesteps == made.timesteps.tolist() and len(sheet.noisy) == len(sheet.predicted) == 5
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(4))
    np.testing.assert_array_equal(sheet.noisy[0], to_pixels(noise).numpy())
    assert abs(sheet.predicted[-1].astype(int) - drawn[0]).max() <= 1
    assert abs(sheet.predicted[0].astype(int) - drawn[0]).max() > 5


def test_a_sheet_of_the_steps_is_drawn_if_asked_for(base):
    out = draw(base, "prompt=a cat \u202e\n", "n=2", "steps=12", "steps_sheet=true", "micro_batch=1")
    first = np.asarray(Image.open(out / "000-seed-0.png").resize((96, 96), Image.Resampling.NEAREST)).astype(int)
    sheet = np.asarray(Image.open(out / "steps.png").convert("RGB")).astype(int)
    (left, width), (top, height) = (GAP, 96 + GAP), (2 * LINE + 2 * GAP, 2 * 96 + LINE + GAP)
    assert sheet.shape[:2] == (top + 2 * height, 10 * width + GAP), "two rows, of ten and of two"
    place = sheet[top + height + 96 : top + height + 192, left + width : left + width + 96]
    assert abs(place - first).max() <= 1, "the last prediction is the picture"
    read = read_images(out)  # by train.neighbours
    assert read.shape == (2, 3, 16, 16)


def test_a_sheet_of_many_steps_shows_a_hundred_from_the_first_to_the_last():
    sheet, levels = StepsSheet(), torch.linspace(-1, 1, 250)
    for t, level in zip(range(249, -1, -1), levels, strict=True):
        flat = level.expand(1, 3, 64, 64)
        sheet(SamplingStep(t, flat, flat, flat))
    drawn = np.asarray(sheet.draw("title"))
    assert drawn.shape[:2] == (2 * LINE + 2 * GAP + 10 * (2 * 64 + LINE + GAP), 10 * (64 + GAP) + GAP)
    first, last = drawn[2 * LINE + 2 * GAP + 5, GAP + 5], drawn[-LINE - GAP - 5, -GAP - 5]
    assert first.tolist() == [0] * 3 and last.tolist() == [255] * 3


def test_a_long_title_of_a_narrow_sheet_is_in_several_lines():
    sheet, picture = StepsSheet(), torch.zeros(1, 3, 16, 16)
    sheet(SamplingStep(0, picture, picture, picture))
    drawn = np.asarray(sheet.draw("A LARGE RED CIRCLE LEFT OF A SMALL BLUE SQUARE ON A WHITE GROUND: step 9,000, ema"))
    height = 3 * LINE + 2 * GAP
    assert drawn.shape[:2] == (height + 2 * 96 + LINE + GAP, 400 + GAP)
    assert drawn[GAP + LINE : GAP + 2 * LINE].min() < 128 and drawn[:height, -GAP:].min() == 255, "nothing is cut"


def trained_net(base: Path) -> UNet:
    return load_net(Checkpoint.open(base / "run"), "ema", torch.device("cpu"))


def test_one_forward_a_step_and_one_projection_a_prompt(base, monkeypatch):
    unet, calls = trained_net(base), []
    monkeypatch.setattr(UNet, "forward", counted(UNet.forward, calls, "forward"))
    monkeypatch.setattr(UNet, "encode_text", counted(UNet.encode_text, calls, "encode_text"))
    empty = torch.from_numpy(read_empty(base / "text", TextMeta.read(base / "text")).copy())
    text = torch.randn(3, 77, NET.encoder_dim)
    scheduler = make_scheduler(TIMESTEPS, True)
    sample(unet, scheduler, text, empty, 3.0, 5, [1, 2, 3])
    assert [(name, n) for name, n in calls if name == "forward"] == [("forward", 6)] * 5
    assert [(name, n) for name, n in calls if name != "forward"] == [("encode_text", 3), ("encode_text", 1)]
    calls.clear()
    sample(unet, scheduler, text, empty, 1.0, 5, [1, 2, 3])
    assert calls == [("encode_text", 3)] + [("forward", 3)] * 5, "without guidance half of it"


def counted(function, calls: list, name: str):
    def call(self, x, *args):
        calls.append((name, len(x)))
        return function(self, x, *args)

    return call


def test_guidance_of_one_is_the_formula_at_one(base):
    unet, empty = trained_net(base), torch.randn(77, NET.encoder_dim)
    text, scheduler = torch.randn(2, 77, NET.encoder_dim), make_scheduler(TIMESTEPS, True)
    plain = sample(unet, scheduler, text, empty, 1.0, 5, [1, 2]).int()
    near = sample(unet, scheduler, text, empty, 1.0 + 1e-6, 5, [1, 2]).int()
    assert (plain - near).abs().max() <= 1
    assert (plain - sample(unet, scheduler, text, empty, 3.0, 5, [1, 2]).int()).abs().max() > 5


@pytest.mark.parametrize(("scheduler", "steps"), [("ddpm", 2), ("ddpm", 350), ("ddpm", 600), ("ddim", 40)])
def test_steps_begin_at_pure_noise(scheduler, steps):
    """diffusers' default spacing would begin 600 steps at t = 599."""
    made = make_scheduler(1000, True, scheduler)
    set_steps(made, steps)
    timesteps = made.timesteps.tolist()
    assert timesteps[0] == 999 and len(timesteps) == steps == len(set(timesteps))
    assert timesteps[-1] == (0 if scheduler == "ddpm" else 1000 // steps - 1)


class OneImage(nn.Module):
    """The optimal noise predictor where the data is a single image: every sampler must end at that."""

    def __init__(self, x_start: Tensor, timesteps: int) -> None:
        super().__init__()
        self.config, self.x_start, self.diffusion = NET, nn.Parameter(x_start), Diffusion(timesteps)

    def encode_text(self, text_emb: Tensor) -> TextState:
        return TextState(text_emb, text_emb)

    def forward(self, x: Tensor, t: Tensor, text: TextState) -> Tensor:
        signal, noise = (
            v[t][:, None, None, None].double()
            for v in (self.diffusion.sqrt_alphas_cumprod, self.diffusion.sqrt_one_minus_alphas_cumprod)
        )
        return torch.cat([(x - signal * self.x_start) / noise, torch.zeros_like(x)], 1)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("ddpm", 1000), ("ddpm", 333), ("ddpm", 2), *(("ddpm", preset) for preset in PRESETS), ("ddim", 2), ("ddim", 50),
     ("dpm++", 10), ("dpm++", 25)],
)  # fmt: skip
def test_every_scheduler_ends_at_the_only_image_there_is(scheduler, steps):
    torch.manual_seed(0)
    expected = torch.randint(0, 256, (3, 16, 16))
    net = OneImage(expected / 127.5 - 1, 1000)
    text = torch.zeros(2, 1, 1)
    images = sample(net, make_scheduler(1000, True, scheduler), text, text[0], 5.0, steps, [1, 2])
    assert (images.int() - expected).abs().max() <= 1


class OneGaussian(nn.Module):
    """The optimal predictor, of noise and of variance, where the data is N(0, sigma^2)."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.config, self.sigma, self.diffusion = NET, nn.Parameter(torch.tensor(sigma)), Diffusion(1000)
        self.spacing: list[int] = []

    def encode_text(self, text_emb: Tensor) -> TextState:
        return TextState(text_emb, text_emb)

    def forward(self, x: Tensor, timesteps: Tensor, text: TextState) -> Tensor:
        t = int(timesteps[0])
        alphas = self.diffusion.alphas_cumprod.double()
        now, i = alphas[t], self.spacing.index(t)
        before = alphas[self.spacing[i + 1]] if i + 1 < len(self.spacing) else torch.tensor(1.0)
        total = now * self.sigma**2 + 1 - now
        eps = x * ((1 - now).sqrt() / total)
        alpha = now / before
        # q(x_before | x_t) with x_start integrated out; its variance as the share between the bounds, in logarithms.
        of_before = before * self.sigma**2 + 1 - before
        variance = (1 - alpha) * of_before / total
        low, high = ((1 - before) / (1 - now) * (1 - alpha)).clamp(min=1e-20).log(), (1 - alpha).log()
        share = (variance.log() - low) / (high - low) * 2 - 1 if i + 1 < len(self.spacing) else torch.tensor(0.0)
        return torch.cat([eps, share.expand_as(x)], 1)


@pytest.mark.parametrize("steps", [10, 40, "smart27"])
def test_the_learned_variance_makes_few_steps_keep_the_spread_of_the_data(steps):
    """By the exact posterior variance each step is exact, so ten suffice; the fixed one is too narrow with as few."""
    spread = {}
    for learned in (True, False):
        scheduler, net = make_scheduler(1000, learned), OneGaussian(0.3)
        set_steps(scheduler, steps)
        net.spacing = scheduler.timesteps.tolist()
        text = torch.zeros(8, 1, 1)
        images = sample(net, scheduler, text, text[0], 1.0, steps, list(range(8)))
        spread[learned] = ((images.double() / 127.5 - 1) ** 2).mean().sqrt()
    assert spread[True] == pytest.approx(0.3, rel=0.03)
    assert spread[False] < spread[True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint=absent", "/absent' has no whole checkpoint"),
        ("checkpoint=damaged", "/damaged' has no whole checkpoint"),
        ("checkpoint=foreign", "is not one of this version"),
        ("checkpoint=other_net", "don't fit the net"),
        ("checkpoint=no_encoder prompt=cat", "the encoder './gone/t5' cannot be loaded"),
        ("checkpoint=no_data", "the data of the training, with its captions, is not here"),
        ("checkpoint=no_data prompt=", "no embedding of the empty caption"),
        ("checkpoint=re_embedded", "are not those of the training, but made by"),
        ("prompt=cat encoder=other_t5", "is another encoder than the one that"),
        ("prompt=cat embeddings=x.npy", "choose one"),
        ("to=cat", "to= is where a strip ends: give the prompt= too"),
        ("prompt=cat to=dog strip=1", "strip=1 must be at least 2"),
        ("prompt=cat strip=8", "strip=8 is of a strip, which needs to="),
        ("prompt=cat to=dog encoder=other_t5", "is another encoder than the one that"),
        ("embeddings=x.npy", "cannot be read as .npy"),
        ("embeddings=narrow.npy", "is [77, 3], the net was trained on [77, 48]"),
        ("embeddings=nan.npy", "not finite"),
        ("embeddings=objects.npy", "cannot be read as .npy"),
        ("embeddings=several.npz", "is not one array"),
        ("scheduler=euler", "scheduler=euler must be one of ddpm, ddim, dpm++"),
        ("steps=251", "must lie between 2 and the 250"),
        ("steps=1", "must lie between 2 and the 250"),
        ("steps=quick", "steps=quick must be a number or one of fast27"),
        ("steps=fast27", "made for ddpm and 1000 diffusion steps, this is DDPMScheduler with 250"),
        ("steps=60 scheduler=ddim", "steps=50 is the nearest"),
        ("steps=250 scheduler=dpm++", "take fewer"),
        ("guidance_scale=nan", "guidance_scale=nan must be at least 0"),
        ("guidance_scale=-1", "guidance_scale=-1.0 must be at least 0"),
        ("n=0", "n=0 must be at least 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("weights=raw", "weights=raw must be one of ema, master"),
        ("weights=masters", "(did you mean 'master'?)"),
        ("ema_length=0.5", "ema_length=0.5 must be above 0 and at most 0.28"),
        ("weights=master ema_length=0.1", "weights=master and ema_length=0.1 are both given"),
        ("ema_length=0.1", "tracked no power-function averages (ema_snapshot_every=0)"),
        ("out=taken", "/taken exists already: choose another out="),
        ("out=taken/file/x", "could not be written"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(base, mistaken, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(mistaken)
    before = set(mistaken.rglob("*"))
    given = [] if "checkpoint=" in arguments else [f"checkpoint={base / 'run'}"]
    with pytest.raises(SystemExit) as caught:
        main([*given, *([] if "steps=" in arguments else ["steps=2"]), *arguments.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert set(mistaken.rglob("*")) == before


@pytest.fixture(scope="module")
def mistaken(base, tmp_path_factory) -> Path:
    """Runs, encoders and embeddings that must be refused."""
    folder = tmp_path_factory.mktemp("mistaken")

    def changed(name: str, change) -> Path:
        return changed_run(base / "run", folder / name, change)

    (changed("damaged", lambda m: None) / "rank-00001.safetensors").write_bytes(b"half")
    changed("foreign", lambda m: m["config"]["model"].update(depth=3))
    changed("other_net", lambda m: m["config"]["model"].update(num_res_blocks=2))
    changed("no_encoder", lambda m: m["text"].update(encoder="./gone/t5"))
    changed("no_data", lambda m: m["config"]["data"].update(shards="gone", text="gone"))
    changed("re_embedded", lambda m: m["text"].update(weights_sha256="0"))
    write_tiny_t5(TinyT5(out=str(folder / "other_t5"), dim=NET.encoder_dim, seed=1))
    np.save(folder / "narrow.npy", np.zeros((77, 3), np.float32))
    np.save(folder / "nan.npy", np.full((77, NET.encoder_dim), np.nan, np.float32))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(folder / "several.npz", a=np.zeros(1))
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    return folder


def test_a_full_disk_is_told_and_leaves_nothing(base, tmp_path):
    """A limit on the size of files fails as a full disk does, while the folder is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"'full' could not be written .*: make space there, or choose another place"):
            run(Sample(str(base / "run"), "a cat", n=2, steps="2", out="full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_masters_are_another_net(base):
    averaged, trained = pixels(draw(base, "prompt=a cat")), pixels(draw(base, "prompt=a cat", "weights=master"))
    assert (averaged - trained).abs().float().mean() > 1
    assert torch.equal(trained_net(base).out[2].bias, random_net(NET, 2).out[2].bias)


@pytest.mark.parametrize("path", ["run", "run/checkpoints/step-00000007"])
def test_a_manifest_is_read_once_when_a_net_is_loaded(base, tmp_path, path):
    """Of a run with several checkpoints the newest one's, and no other."""
    changed_run(base / "run", tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/step-00000007", tmp_path / "run/checkpoints/step-00000003")
    newest = str(tmp_path / "run/checkpoints/step-00000007/manifest.json")
    with opened_manifests() as opened:
        run(Sample(str(tmp_path / path), "a cat", n=1, steps="2"))
    assert opened == [newest]
    with opened_manifests() as opened:
        export(Export(str(tmp_path / path), str(tmp_path / "if"), encoder="auto"))
    assert opened == [newest]
    with opened_manifests() as opened:
        (checkpoint,) = open_nets(str(tmp_path / path), "", [])
        find_net(checkpoint, "", "ema", str(base / "text")).load(torch.device("cpu"))
    assert opened == [newest]


def test_a_net_is_sampled_in_bfloat16_only_on_a_gpu_and_if_it_was_trained_so(base, tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    dtypes = [sampling_dtype(precision, device) for precision in ("bf16", "fp32") for device in (cpu, gpu)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    changed_run(base / "run", tmp_path / "run", lambda manifest: manifest["config"].update(precision="bf16"))
    unet = load_net(Checkpoint.open(tmp_path / "run"), "ema", cpu)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
