"""The model card of an exported folder: what it is, the recipe, the data and the licence, as the hub reads it."""

import copy
import re

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf

from data.text.captions import cleaner, lower_strip
from train.weights.pretrained import Trained

UNKNOWN = "not stated"
# What a reader of a card asks for, and where in the run's configuration it stands.
RECIPE: dict[str, str | tuple[str, ...]] = {
    "images of a batch": "global_batch",
    "optimizer": "optim.name",
    "learning rate, start, peak, end": ("optim.lr_start", "optim.lr_peak", "optim.lr_end"),
    "warm-up steps": "optim.warmup_steps",
    "weight decay": "optim.weight_decay",
    "gradient clipped at": "optim.grad_clip",
    "precision": "precision",
    "decay of the average": "ema_decay",
    "diffusion steps": "diffusion_steps",
    "captions dropped to the empty one": "data.cond_drop_prob",
    "text tokens": "data.tokens",
    "seed": "seed",
}
TEXT = """
# {name}

A text-to-image diffusion model of {pixels} px images: the first stage of DeepFloyd IF, trained from {origin}.
{weights} of step {step}{of_steps}.

## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", dtype=torch.bfloat16)
pipeline.enable_model_cpu_offload()  # needs accelerate; or pipeline.to("cuda")
{call}
```

{conditions}
Images of a further stage, such as IF-II, are made from `images` (with `output_type="pt"`) and the same embeddings.

## Recipe

| | |
|---|---|
{recipe}

The whole configuration, without the places on the machines of the training:

```yaml
{config}```

## Data

{data}

## Licence

{license}

## Limits

The images are small. What a prompt can name, and how people and places look, follows from the captions and images
of the training, with all their bias. Nothing filters prompts or images: this pipeline has neither safety checker nor
watermark.
"""
BY_PROMPT = 'images = pipeline("a red circle", guidance_scale=7.0, clean_caption={clean}).images'
BY_EMBEDDING = (
    "images = pipeline(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, "
    "guidance_scale=7.0).images"
)


def check_license(name: str) -> None:
    """Raises: ValueError for what the hub does not take for the name of a licence."""
    if not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", name):
        raise ValueError(
            f"license={name!r} is no identifier of a licence: such as apache-2.0, mit, openrail, or other "
            "(https://huggingface.co/docs/hub/repositories-licenses)"
        )


def model_card(trained: Trained, name: str, weights: str, license: str, has_encoder: bool) -> ModelCard:
    """The card of a checkpoint's export.  name: of its folder."""
    run = trained.run
    front = ModelCardData(
        license=license,
        license_name="see-the-card" if license == "other" else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["deepfloyd-if", "pixel-diffusion", "if-stage-1"],
    )
    rows = [f"| {what} | {_told(run, where)} |" for what, where in RECIPE.items()]
    rows.append(f"| images seen | {_images(trained)} |")
    rows.append(f"| GPUs, or ranks | {trained.manifest.get('ranks', UNKNOWN)} |")
    text = TEXT.format(
        name=name,
        pixels=trained.model.image_size,
        origin=f"the weights of `{_last(run['init_from'])}`" if run.get("init_from") else "random weights",
        weights="The moving average of the weights" if weights == "ema" else "The weights",
        step=f"{trained.step:,}",
        of_steps=f" of {run['steps']:,}" if "steps" in run else "",
        call=BY_PROMPT.format(clean=_cleans(trained)) if has_encoder else BY_EMBEDDING,
        conditions=_conditions(trained, has_encoder),
        recipe="\n".join(rows),
        config=OmegaConf.to_yaml(OmegaConf.create(_without_places(run))),
        data=_data(trained),
        license=_license(run, license),
    )
    return ModelCard(f"---\n{front.to_yaml()}\n---\n{text}")


def _told(run: dict, where: str | tuple[str, ...]) -> str:
    if isinstance(where, tuple):
        return ", ".join(_told(run, one) for one in where)
    value: object = run
    for part in where.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _images(trained: Trained) -> str:
    batch = trained.run.get("global_batch")
    return f"{trained.step * batch:,}" if batch else UNKNOWN


def _conditions(trained: Trained, has_encoder: bool) -> str:
    told = _text_meta(trained)
    if has_encoder:
        return (
            f"The text encoder ({told}) comes along. Say `clean_caption={_cleans(trained)}`, since the captions of the "
            f"training were cleaned so ({trained.text.cleaning}).\n"
        )
    return (
        f"The text encoder is not in here. `prompt_embeds` are [N, tokens, width] of {told}; `negative_prompt_embeds` "
        "as many copies of the empty caption's, never zeros.\n"
    )


def _cleans(trained: Trained) -> bool:
    """Whether IFPipeline's own cleaning is that of the training, or only its lower case is."""
    return cleaner(trained.text.cleaning) is not lower_strip


def _text_meta(trained: Trained) -> str:
    try:
        meta = trained.text
    except ValueError:
        return f"an encoder {UNKNOWN}"
    return f"`{_last(meta.encoder)}`, {meta.tokens} tokens x {meta.dim}"


def _data(trained: Trained) -> str:
    data = trained.run.get("data", {})
    names = list(data.get("mixture") or []) or ([_last(data["shards"])] if data.get("shards") else [])
    counts = trained.manifest.get("samples") or []
    lines = [
        f"- `{name}`: {f'{counts[i]:,}' if i < len(counts) else 'an unstated number of'} captioned images"
        for i, name in enumerate(names)
    ]
    return "\n".join(lines or [f"- {UNKNOWN}"]) + f"\n- captions embedded by {_text_meta(trained)}"


def _license(run: dict, license: str) -> str:
    told = f"{license}." if license != "other" else "Not stated by who exported it; ask before use."
    if run.get("init_from"):
        told += f" The training began from `{_last(run['init_from'])}`, whose licence goes with what was made of it."
    return told + " The licence of the data is its owners'."


def _last(place: str) -> str:
    """A name on the hub as it is; of a path or an address its end, which tells nothing of a machine."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not place.startswith("."):
        return place
    return re.split(r"[/\\]", place.rstrip("/\\").partition("?")[0])[-1]


def _without_places(run: dict) -> dict:
    run = copy.deepcopy(run)
    for key in ("run_dir", "init_from", "wandb"):
        run.pop(key, None)
    data = run.get("data", {})
    for dataset in (data, *data.get("mixture", {}).values()):
        dataset.pop("shards", None)
        dataset.pop("text", None)
    return run
