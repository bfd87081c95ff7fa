"""The exported folder in diffusers and on its way to the hub: the same pictures, IF-II, offloading, the model card."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from huggingface_hub import CommitOperationAdd, ModelCard
from torch import Tensor

from data.config import DataConfig, DatasetConfig, TextConfig, ValidationConfig
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.convert import diffusers_config
from tests.checkpoints import write_run
from tests.test_export import NET, TIMESTEPS, load, trained, write_meta
from train.checkpoint.checkpoint import Checkpoint
from train.config import Config, OptimConfig
from train.export import Export, export, main
from train.sampling.sampler import PRESETS, make_scheduler, sample
from train.weights.model_card import _without_paths, model_card

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Runs of the 1000 timesteps of IF and of fewer, both exported with their encoder."""
    base = tmp_path_factory.mktemp("exported")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=NET.encoder_dim))
    write_meta(base / "t5", base / "text")
    for name, timesteps in (("run", TIMESTEPS), ("if-like", 1000)):
        secret = base / "secret"
        write_run(
            base / name, NET, base / "text", diffusion_steps=timesteps, global_batch=3072, steps=2_420_000,
            optim=OptimConfig(name="adamw8bit", lr_start=2e-6, lr_peak=5e-5, lr_end=5e-9),
            init_from=str(secret / "IF-I-M-v1.0"), text=TextConfig(encoder=str(secret / "t5")),
            data=DataConfig(
                shards=str(secret / "laion"), text=str(base / "text"), drop=[str(secret / "drop.txt")],
                validation=ValidationConfig(shards="s3://secret/held?X-Amz-Signature=1", text=str(secret / "held")),
                cond_drop_prob=0.1,
            ),
        )  # fmt: skip
        export(Export(str(base / name), str(base / f"{name}-if"), encoder="auto", license="apache-2.0"))
    return base


def embeddings(pipeline: DiffusionPipeline, n: int) -> tuple[Tensor, Tensor]:
    """Of the prompt, n times, and of the empty caption, n times."""
    return pipeline.encode_prompt(PROMPT, num_images_per_prompt=n, clean_caption=False)


@pytest.mark.parametrize(
    ("name", "scheduler", "steps"),
    [("run", "ddpm", 7), ("run", "ddim", 5), ("run", "dpm++", 6), ("if-like", "ddpm", "fast27")],
)
def test_each_scheduler_gives_the_picture_of_train_sample(base, name, scheduler, steps):
    pipeline = load(base / f"{name}-if")
    timesteps = pipeline.scheduler.config.num_train_timesteps
    text, empty = embeddings(pipeline, 3)
    expected = sample(
        trained(base, name), make_scheduler(timesteps, True, scheduler), text, empty[0], 2.0, steps, [4, 5, 6]
    )
    if scheduler != "ddpm":
        pipeline.scheduler = make_scheduler(timesteps, True, scheduler)
    images = pipeline(
        PROMPT, num_images_per_prompt=3, guidance_scale=2.0, clean_caption=False, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5, 6)],
        **({"timesteps": PRESETS[steps]} if isinstance(steps, str) else {"num_inference_steps": steps}),
    ).images  # fmt: skip
    assert expected.float().std() > 10
    # A net of random weights makes more of a rounding from step to step; train.sample's pictures are in whole levels.
    apart = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255 - expected).abs()
    assert apart.max() < 3 and (apart < 1).float().mean() > 0.999


def test_one_image_takes_one_generator_of_the_same_seed(base):
    pipeline = load(base / "run-if")
    text, empty = embeddings(pipeline, 1)
    expected = sample(trained(base, "run"), make_scheduler(TIMESTEPS, True), text, empty[0], 2.0, 5, [9])
    images = pipeline(PROMPT, generator=torch.Generator().manual_seed(9), num_inference_steps=5, guidance_scale=2.0,
                      clean_caption=False, output_type="np").images  # fmt: skip
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) * 255 - expected).abs().max() < 1


def second_stage() -> IFSuperResolutionPipeline:
    """IF-II in small, with random weights: it takes the image of the first stage, and its embeddings."""
    config = diffusers_config(replace(NET, image_size=32, attention_resolutions=[16], in_channels=6, out_channels=12))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config | {"out_channels": 6, "class_embed_type": "timestep"})
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    pipeline = IFSuperResolutionPipeline(
        tokenizer=None, text_encoder=None, unet=unet, scheduler=make_scheduler(1000, True),
        image_noising_scheduler=noising, safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_goes_on_into_the_second_stage(base):
    """As IF's own card does it: one encoding of the prompt serves both."""
    first, second = load(base / "if-like-if"), second_stage()
    text, empty = first.encode_prompt(PROMPT, clean_caption=False)
    options = {"prompt_embeds": text, "negative_prompt_embeds": empty, "num_inference_steps": 2, "output_type": "pt"}
    small = first(**options, generator=torch.Generator().manual_seed(0)).images
    assert small.shape == (1, 3, 16, 16)

    def large(**changed: object) -> Tensor:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(0)
        return second(**options | {"image": small} | changed, generator=generator, noise_level=250).images

    image = large()
    assert image.shape == (1, 3, 32, 32) and torch.isfinite(image).all()
    assert torch.equal(large(), image)
    assert not torch.equal(large(image=small.flip(3)), image), "the first stage's image counts"


def test_offloading_model_by_model_changes_no_pixel(base):
    """As IF's card does it; the hooks run in full, with the CPU in the place of the GPU."""
    options = {"num_inference_steps": 2, "clean_caption": False, "output_type": "np"}
    expected = load(base / "run-if")(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    pipeline = load(base / "run-if")
    pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.unet, "_hf_hook") and hasattr(pipeline.text_encoder, "_hf_hook")
    for _ in range(2):
        images = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
        assert (images == expected).all()


def test_attention_slices_and_half_precision_load_as_the_card_has_it(base):
    pipeline = load(base / "run-if", dtype=torch.bfloat16, variant=None)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    pipeline.enable_attention_slicing()
    assert pipeline(PROMPT, num_inference_steps=2, clean_caption=False).images[0].size == (16, 16)


def test_the_card_is_what_the_hub_reads(base):
    card = ModelCard.load(base / "run-if" / "README.md")
    front = card.data.to_dict()
    training = front.pop("training")
    assert training.pop("run") != ModelCard.load(base / "if-like-if" / "README.md").data.to_dict()["training"]["run"]
    assert training == {"step": 7, "weights": "ema", "dtype": "float32", "text_encoder": True}
    assert front == {
        "license": "apache-2.0", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["deepfloyd-if", "pixel-diffusion", "if-stage-1"],
    }  # fmt: skip
    for told in (
        "| images of a batch | 3,072 |",
        "| learning rate, start, peak, end | 2e-06, 5e-05, 5e-09 |",
        "| images seen | 21,504 |",
        "| GPUs, or ranks | 2 |",
        "step 7 of 2,420,000",
        "- `laion`: 1,000 captioned images",
        "`t5`, 77 tokens x 48",
        "| text tokens | 77 |",
        "began from `IF-I-M-v1.0`, whose licence applies to these weights too",
        "clean_caption=True",
        "diffusion_steps: 250",
    ):
        assert told in card.text, told
    assert "secret" not in card.content and str(base) not in card.content
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code.group(1), "card", "exec")


def test_no_place_of_a_mixture_is_told():
    data = {name: DatasetConfig(shards="secret", text="secret", drop=["secret"], weight=3) for name in ("text", "a.b")}
    config = asdict(Config(run_dir="secret", data=DataConfig(mixture=data, drop=["secret"])))
    public = _without_paths(config | {"init_from": "secret", "wandb": {"project": "secret"}})
    assert "secret" not in str(public)
    assert public["data"]["mixture"] == {name: {"weight": 3, "where": ""} for name in ("text", "a.b")}


def test_the_code_of_the_card_runs(base, monkeypatch):
    monkeypatch.chdir(base)
    code = re.search(r"```python\n(.*?)```", ModelCard.load(base / "if-like-if" / "README.md").text, re.DOTALL).group(1)
    assert "pipeline.enable_model_cpu_offload()" in code
    found = {}
    exec(code.replace("pipeline.enable_model_cpu_offload()", "").replace("7.0,", "7.0, num_inference_steps=2,"), found)
    assert found["images"][0].size == (16, 16)


def test_every_file_can_be_committed_to_the_hub(base):
    """What can be checked here of what the hub checks: paths, sizes, the index that makes it a pipeline."""
    folder = base / "run-if"
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        operation = CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        assert operation.upload_info.size == path.stat().st_size > 0
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "IFPipeline"
    assert {name for name, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list)) if library} == {
        "unet", "scheduler", "tokenizer", "text_encoder"
    }  # fmt: skip
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")], "nothing is a pickle"


def test_a_card_without_encoder_or_licence_says_so(base, tmp_path):
    export(Export(str(base / "run"), str(tmp_path / "plain")))
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "see-the-card")
    assert "Not stated by who exported it" in card.text and "prompt_embeds=prompt_embeds" in card.text


def test_the_card_says_how_the_captions_of_the_training_were_cleaned(base):
    checkpoint = Checkpoint.open(base / "run")
    for cleaning, clean in (("if-1", True), ("lower-strip", False)):
        checkpoint.text.cleaning = cleaning
        card = model_card(checkpoint, "x", "ema", "mit", has_encoder=True).text
        assert f"clean_caption={clean}).images" in card and f"cleaned so ({cleaning})" in card


@pytest.mark.parametrize("name", ["Apache 2.0", "", "my_licence", "../x"])
def test_what_is_no_licence_is_refused(base, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([f"checkpoint={base / 'run'}", f"out={tmp_path / 'x'}", f"license={name}"])
    assert caught.value.code == 2 and "is not the name of a licence on the hub" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
