"""train.export of a net of the second stage: diffusers' folder, the cascade of two folders, the card, the way back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor

from data.text.encoder import TextEncoder
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.super_resolution import make_net
from model.unet import UNet
from tests.checkpoints import write_run
from tests.support.hub_server import Hub, Repo
from tests.support.trainings import make_data
from tests.test_second_stage import NET as NET_OF_24
from tests.test_second_stage import SMALL
from tests.test_second_stage import trained as train
from train.checkpoint.checkpoint import Checkpoint
from train.compose import compose_config
from train.export import Export, export, main
from train.sampling.sampler import SamplingStep, make_scheduler, sample
from train.weights.pretrained import load_pretrained

# A tiny T5's width is a multiple of 16.
NET = replace(NET_OF_24, encoder_dim=32)
FIRST = replace(NET, image_size=4, low_res_size=0, attention_resolutions=[4], scale_skip_connection=False)
# A net that learned no variance, in a training of fewer timesteps, attending to the text alone as the released ones.
EPS = replace(NET, out_channels=3, self_attention=False)
NETS = {"first": FIRST, "second": NET, "eps": EPS}
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny T5, and runs of the nets with their exports; the first has its encoder in its folder."""
    base = tmp_path_factory.mktemp("export")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=NET.encoder_dim))
    (base / "text").mkdir()
    TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu")).meta("float16").write(base / "text")
    for name, net in NETS.items():
        write_run(base / name, net, base / "text", diffusion_steps=250 if name == "eps" else 1000)
        encoder = str(base / "t5") if name != "second" else ""
        export(Export(str(base / name), str(base / f"{name}-if"), encoder=encoder))
    return base


def trained(base: Path, name: str) -> UNet:
    unet = make_net(NETS[name]).requires_grad_(False)
    unet.load_state_dict(Checkpoint.open(base / name).weights("ema"), strict=True)
    return unet


def load(folder: Path, **options: object) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as levels from 0 to 255, not rounded."""
    return (images + 1) * 127.5


@pytest.mark.parametrize(
    ("name", "steps", "variance"), [("second", 1000, "learned_range"), ("eps", 250, "fixed_small")]
)
def test_diffusers_takes_the_folder_for_one_of_the_second_stage(base, name, steps, variance):
    pipeline = load(base / f"{name}-if")
    assert isinstance(pipeline, IFSuperResolutionPipeline) and pipeline.safety_checker is pipeline.watermarker is None
    config, noising = pipeline.scheduler.config, pipeline.image_noising_scheduler.config
    assert (config.thresholding, config.dynamic_thresholding_ratio, config.sample_max_value) == (True, 0.95, 1.0)
    assert (config.variance_type, config.num_train_timesteps, config.prediction_type) == (variance, steps, "epsilon")
    assert (noising.num_train_timesteps, noising.beta_schedule) == (steps, "squaredcos_cap_v2")
    index = json.loads((base / f"{name}-if" / "model_index.json").read_text())
    parts = {part for part, kind in index.items() if isinstance(kind, list) and kind[0]}
    encoder = {"tokenizer", "text_encoder"} if name == "eps" else set()
    assert parts == {"unet", "scheduler", "image_noising_scheduler"} | encoder
    modes = {path.stat().st_mode for path in (base / f"{name}-if").rglob("*") if path.is_file()}
    assert modes == {(base / f"{name}-if" / "model_index.json").stat().st_mode}


def test_without_a_learned_variance_a_prompt_gives_the_picture_of_the_sampler(base):
    """By the encoder in the folder, at the same share of fewer timesteps."""
    encoder = TextEncoder(str(base / "t5"), 77, "float32", torch.device("cpu"))
    text, empty = torch.from_numpy(encoder(PROMPTS)), torch.from_numpy(encoder([""]))[0]
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scheduler = make_scheduler(250, False, second_stage=True)
    expected = sample(trained(base, "eps"), scheduler, text, empty, 4.0, 5, [4, 5], low_res=small)
    images = load(base / "eps-if")(
        PROMPTS, image=small, num_inference_steps=5, guidance_scale=4.0, noise_level=62, output_type="np",
        generator=generators(4, 5),
    ).images  # fmt: skip
    assert expected.float().std() > 10
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) * 255 - expected).abs().max() < 1


def test_two_folders_draw_in_turn_what_the_sampler_draws_with_two_nets(base):
    """As IF's own card does it: one encoding of the prompts, and the first stage's images as floats."""
    first, second = load(base / "first-if"), load(base / "second-if", text_encoder=None)
    assert isinstance(first, IFPipeline)
    text, negative = first.encode_prompt(PROMPTS, clean_caption=True)
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": negative, "num_inference_steps": 5, "output_type": "pt"}
    small = first(**embeds, guidance_scale=7.0, generator=generators(1, 2)).images
    assert small.shape == (2, 3, 4, 4) and small.std() > 0.1 and small.abs().max() <= 1, "nothing has to be clamped"
    large = second(image=small, **embeds, guidance_scale=4.0, noise_level=250, generator=generators(3, 4)).images

    drawn: list[SamplingStep] = []
    sample(trained(base, "first"), make_scheduler(1000, True), text, negative[0], 7.0, 5, [1, 2], drawn.append)
    ours = drawn[-1].x_next
    assert (pixels(small) - pixels(ours)).abs().max() < 0.1
    scheduler = make_scheduler(1000, True, second_stage=True)
    expected = sample(trained(base, "second"), scheduler, text, negative[0], 4.0, 5, [3, 4], low_res=ours)
    assert expected.float().std() > 10 and large.abs().max() <= 1
    assert (pixels(large) - expected).abs().max() < 1


@pytest.mark.parametrize("name", ["second", "eps"])
def test_the_code_of_the_card_runs(base, monkeypatch, name):
    monkeypatch.chdir(base)
    card = ModelCard.load(base / f"{name}-if" / "README.md").text
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1).replace("FIRST_STAGE", "first-if")
    assert "stage.enable_model_cpu_offload()" in code and code.count("guidance_scale=") == 2
    code = code.replace("enable_model_cpu_offload()", "set_progress_bar_config(disable=True)")
    code = code.replace("guidance_scale=", "num_inference_steps=2, guidance_scale=")
    given = (
        {} if name == "eps" else {key: torch.zeros(1, 77, 32) for key in ("prompt_embeds", "negative_prompt_embeds")}
    )
    exec(code, given)
    assert given["second"].dtype == torch.bfloat16 and given["images"][0].size == (16, 16)


def test_the_card_tells_what_is_true_of_the_second_stage(base):
    cards = {name: ModelCard.load(base / f"{name}-if" / "README.md") for name in NETS}
    first, second, eps = (card.data.to_dict() | {"text": card.text} for card in cards.values())
    assert (first["pipeline_tag"], second["pipeline_tag"]) == ("text-to-image", "image-to-image")
    assert first["tags"][-1] == "if-stage-1" and second["tags"] == ["deepfloyd-if", "pixel-diffusion", "if-stage-2"]
    assert second["training"]["run"] != eps["training"]["run"]
    for told in (
        "draws images of 4 px in 16 px after their captions: the second stage of DeepFloyd IF",
        "guidance_scale=4.0, noise_level=250)",
        "from 0 to 999",
        "net that draws 4 px images",
        "| noise on the small image | at a timestep of its own, uniform in the 1,000 |",
        "low_res_size: 4",
        "The text encoder is not included",
        "If that one is in its folder, `first.encode_prompt(..., clean_caption=True)` makes the embeddings",
        "The large image keeps faults of the small one. What a prompt",
    ):
        assert told in second["text"], told
    for told in ("noise_level=62)", "from 0 to 249", "first.encode_prompt(\"a red circle\", clean_caption=True)",
                 "uniform in the 250 |", "If that one is not in its folder, load `second` without"):  # fmt: skip
        assert told in eps["text"], told
    assert not re.search("second stage|small image|noise_level", first["text"])


def test_the_command_tells_the_pipeline_and_both_sizes(base, tmp_path, capsys):
    main([f"checkpoint={base / 'second'}", f"out={tmp_path / 'if'}", "weights=master", "dtype=bfloat16"])
    told = (
        "an IFSuperResolutionPipeline without text encoder: give prompt_embeds; master weights of step 7 in bfloat16, 4"
    )
    assert f"{told} -> 16 px, 1000 diffusion steps, learned variance" in capsys.readouterr().out
    master = Checkpoint.open(base / "second").weights("master")
    assert same(load_pretrained(tmp_path / "if", NET), {name: value.bfloat16() for name, value in master.items()})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["second", "eps"])
def test_the_way_back_is_exact(base, tmp_path, name):
    unet, folder = trained(base, name), base / f"{name}-if"
    released = {f"module.{key}": value for key, value in unet.state_dict().items()}
    save_file(released, tmp_path / "weights.safetensors")
    for path in (folder, base / name, tmp_path / "weights.safetensors"):
        assert same(load_pretrained(path, unet.config), unet.state_dict()), path


@pytest.mark.parametrize(
    ("name", "net", "theirs", "ours"), [("first", NET, "first", "second"), ("second", FIRST, "second", "first")]
)
def test_weights_of_the_other_stage_are_refused_as_such(base, tmp_path, name, net: UNetConfig, theirs, ours):
    save_file(trained(base, name).state_dict(), tmp_path / "weights.safetensors")
    for path in (base / f"{name}-if", base / name, tmp_path / "weights.safetensors"):
        with pytest.raises(ValueError) as caught:
            load_pretrained(path, net)
        assert str(caught.value) == (
            f"the weights in '{path}' are of IF's {theirs} stage, this net is of the {ours} "
            f"(model.low_res_size={net.low_res_size}): name weights of the {ours} stage, or set model to a net of the "
            f"{theirs}"
        )
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"don't fit the net: .*\(conv_in\.weight is \[3\]"):
        load_pretrained(tmp_path / "odd.safetensors", net)


def test_weights_for_small_images_of_another_size_are_taken_and_told(base, caplog):
    other = replace(NET, low_res_size=2)
    assert load_pretrained(base / "second", other).keys() == make_net(other).state_dict().keys()
    (line,) = [record.getMessage() for record in caplog.records if "enlarges" in record.getMessage()]
    assert line == f"{base / 'second'}: its net enlarges images of {NET.low_res_size} px, this one images of 2 px"
    load_pretrained(base / "second", NET)
    assert len([record for record in caplog.records if "enlarges" in record.getMessage()]) == 1


def test_a_push_takes_the_place_of_an_earlier_one(base, hub: Hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    hub.add_user("hf_secretsecret", "me")
    arguments = [f"checkpoint={base / 'second'}", f"out={tmp_path / 'net'}", "license=mit", "push_to=me/net"]
    main(arguments)
    repo: Repo = hub.repos["me/net"]
    files = repo.commits[repo.branches["main"]]
    assert {"model_index.json", "image_noising_scheduler/scheduler_config.json"} <= files.keys()
    assert b'from_pretrained("me/net", text_encoder=None' in files["README.md"]
    repo.commit(files | {"image_noising_scheduler/old.json": b"{}"})
    main(arguments)
    assert repo.commits[repo.branches["main"]] == files
    assert "removed  image_noising_scheduler/old.json" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_begins_with_the_weights_of_a_folder(repo, tmp_path):
    data = make_data(tmp_path / "data")
    net = compose_config([*SMALL, "model.encoder_dim=64"]).model
    export(Export(str(write_run(tmp_path / "before", net, data / "text")), str(tmp_path / "if")))
    slow = [f"optim.lr_{at}=1e-6" for at in ("start", "peak", "end")]
    train(repo, data, tmp_path / "after", f"init_from={tmp_path / 'if'}", *slow, ranks=1)
    before, after = load_pretrained(tmp_path / "if", net), Checkpoint.open(tmp_path / "after").weights("master")
    apart = [(after[name] - value).abs().max() for name, value in before.items()]
    assert before.keys() == after.keys() and 0 < max(apart) < 1e-4
