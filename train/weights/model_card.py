"""The model card of an exported folder: what it is, the recipe, the data and the licence, as the hub reads it."""

import re
from functools import reduce
from operator import getitem

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf

from data.text.captions import cleaner, lower_strip
from data.text.meta import TextMeta
from model.super_resolution import AUG_LEVEL
from train.checkpoint.changes import describe_changes
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.identity import run_digest

# What a reader of a card looks for, and the keys of the run's configuration that hold it.
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
    "seed": "seed",
}
# Keys that name places, which a card does not show.
PRIVATE = re.compile(
    r"run_dir|init_from|wandb(\..*)?|text\.encoder|embeddings\.encoder"
    r"|data\.((mixture\..*|validation)\.)?(shards|text|drop)"
)
TEXT = """
# {name}

{what}, trained from {origin}.
{weights} of step {step}, in {dtype}.

## Use

```python
import torch
from diffusers import DiffusionPipeline

{code}
```

{conditions}
{stages}

## Recipe

| | |
|---|---|
{recipe}

{changes}The whole configuration, without paths:

```yaml
{config}```

## Data

{data}

## Licence

{license}

## Limits

{limits} What a prompt can name, and how people and places look, follows from the captions and images
of the training, with all their bias. Nothing filters prompts or images: this pipeline has neither safety checker nor
watermark.
"""
BY_PROMPT = 'images = pipeline("a red circle", guidance_scale=7.0, clean_caption={clean}).images'
BY_EMBEDDING = (
    "images = pipeline(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, "
    "guidance_scale=7.0).images"
)
# What the cards of the two stages do not have in common.
FIRST_STAGE = {
    "what": "A text-to-image diffusion model of {pixels} px images: the first stage of DeepFloyd IF",
    "code": """\
pipeline = DiffusionPipeline.from_pretrained("{name}", dtype=torch.bfloat16)
pipeline.enable_model_cpu_offload()  # needs accelerate; or pipeline.to("cuda")
{call}""",
    "stages": 'Images of a further stage, such as IF-II, are made from `images` (with `output_type="pt"`) and the same '
    "embeddings.",
    "limits": "The images are small.",
}
SECOND_STAGE = {
    "what": "A super-resolution diffusion model, which draws images of {low_res} px in {pixels} px after their "
    "captions: the second stage of DeepFloyd IF",
    "code": """\
first = DiffusionPipeline.from_pretrained("FIRST_STAGE", dtype=torch.bfloat16)
second = DiffusionPipeline.from_pretrained("{name}", text_encoder=None, dtype=torch.bfloat16)
for stage in (first, second):
    stage.enable_model_cpu_offload()  # needs accelerate; or stage.to("cuda")
{encode}embeds = {{"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}}
small = first(**embeds, guidance_scale=7.0, output_type="pt").images
images = second(image=small, **embeds, guidance_scale=4.0, noise_level={noise_level}).images""",
    "stages": "`FIRST_STAGE` is a net that draws {low_res} px images and was trained with the same text encoder. "
    "{encodes} A picture of your own (PIL, of {low_res} px) may take the place of `small`. The higher the "
    "`noise_level`, from 0 to {last}, the more of the small image is drawn anew.",
    "limits": "The large image keeps faults of the small one.",
}
ENCODE = 'prompt_embeds, negative_prompt_embeds = first.encode_prompt("a red circle", clean_caption={clean})\n'
ENCODES = (
    "If that one is not in its folder, load `second` without `text_encoder=None` and let `second.encode_prompt` encode."
)
MAY_ENCODE = "If that one is in its folder, `first.encode_prompt(..., clean_caption={clean})` makes the embeddings."


def model_card(
    checkpoint: Checkpoint, name: str, weights: str, license: str, has_encoder: bool, dtype: str = "float32"
) -> ModelCard:
    """The card of a checkpoint's export.  name: of the exported folder.  weights: 'ema' or 'master'.

    Its front matter says under `training` what the export was made of.
    """
    config, net = checkpoint.config, checkpoint.model
    front = ModelCardData(
        license=license,
        license_name="see-the-card" if license == "other" else None,
        library_name="diffusers",
        pipeline_tag="image-to-image" if net.low_res_size else "text-to-image",
        tags=["deepfloyd-if", "pixel-diffusion", "if-stage-2" if net.low_res_size else "if-stage-1"],
        training={
            "run": run_digest(checkpoint.manifest), "step": checkpoint.step, "weights": checkpoint.title(weights),
            "dtype": dtype, "text_encoder": has_encoder,
        },
    )  # fmt: skip
    kind = "The moving average of the weights" if weights == "ema" else "The weights"
    rows: dict[str, object] = {label: _setting(config, keys) for label, keys in RECIPE.items()}
    if weights == "ema" and checkpoint.average:
        kind += f", of relative length {checkpoint.average.length:g} (a power function's, by EDM2)"
        del rows["decay of the average"]
    rows |= {
        "text tokens": checkpoint.text.tokens,
        "images seen": f"{checkpoint.step * config['global_batch']:,}",
        "GPUs, or ranks": checkpoint.ranks,
    }
    if net.low_res_size:
        rows["noise on the small image"] = f"at a timestep of its own, uniform in the {checkpoint.diffusion_steps:,}"
    text = TEXT.format(
        name=name,
        **_of_stage(checkpoint, name, has_encoder),
        origin=f"the weights of `{_public_name(config['init_from'])}`" if config["init_from"] else "random weights",
        weights=kind,
        step=f"{checkpoint.step:,} of {config['steps']:,}",
        dtype=dtype,
        conditions=_conditions(checkpoint.text, has_encoder),
        recipe="\n".join(f"| {label} | {value} |" for label, value in rows.items()),
        changes=_changes(checkpoint),
        config=OmegaConf.to_yaml(OmegaConf.create(_without_paths(config))),
        data=_data(checkpoint),
        license=_license(config, license),
    )
    return ModelCard(f"---\n{front.to_yaml()}\n---\n{text}")


def _of_stage(checkpoint: Checkpoint, name: str, has_encoder: bool) -> dict[str, str]:
    """The texts of FIRST_STAGE or SECOND_STAGE for a net of it."""
    net, steps, clean = checkpoint.model, checkpoint.diffusion_steps, _cleans(checkpoint.text)
    facts = {
        "name": name, "pixels": net.image_size, "low_res": net.low_res_size,
        "noise_level": int(AUG_LEVEL * steps), "last": steps - 1,
    }  # fmt: skip
    if has_encoder:
        facts |= {"call": BY_PROMPT.format(clean=clean), "encode": ENCODE.format(clean=clean), "encodes": ENCODES}
    else:
        facts |= {"call": BY_EMBEDDING, "encode": "", "encodes": MAY_ENCODE.format(clean=clean)}
    texts = SECOND_STAGE if net.low_res_size else FIRST_STAGE
    return {part: text.format(**facts) for part, text in texts.items()}


def _setting(config: dict, keys: str | tuple[str, ...]) -> str:
    """The value of a dotted key, or those of several."""
    if isinstance(keys, tuple):
        return ", ".join(_setting(config, key) for key in keys)
    value = reduce(getitem, keys.split("."), config)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _changes(checkpoint: Checkpoint) -> str:
    """What changed on the way; the recipe is that of the last steps."""
    lines = []
    for change in checkpoint.manifest["changes"]:
        public = {key: values for key, values in change["changes"].items() if not PRIVATE.fullmatch(key)}
        if public:
            lines.append(f"- from step {change['step'] + 1:,} on: {describe_changes(public)}\n")
    return f"This is the recipe of the last steps. It changed on the way:\n\n{''.join(lines)}\n" if lines else ""


def _conditions(text: TextMeta, has_encoder: bool) -> str:
    if has_encoder:
        return (
            f"The text encoder ({_encoder(text)}) is included. Pass `clean_caption={_cleans(text)}`, because the "
            f"captions of the training were cleaned so ({text.cleaning}).\n"
        )
    return (
        f"The text encoder is not included. `prompt_embeds` are [N, tokens, width] of {_encoder(text)}; "
        "`negative_prompt_embeds` are as many copies of the empty caption's, never zeros.\n"
    )


def _cleans(text: TextMeta) -> bool:
    """Whether IFPipeline's own cleaning was that of the training; otherwise it only made captions lower case."""
    return cleaner(text.cleaning) is not lower_strip


def _encoder(text: TextMeta) -> str:
    return f"`{_public_name(text.encoder)}`, {text.tokens} tokens x {text.dim}"


def _data(checkpoint: Checkpoint) -> str:
    data = checkpoint.config["data"]
    names = list(data["mixture"]) or [_public_name(data["shards"])]
    samples = zip(names, checkpoint.manifest["samples"], strict=True)
    lines = []
    selections = checkpoint.manifest.get("selections") or [None] * len(names)
    for (name, count), selection in zip(samples, selections, strict=True):
        rules = selection["receipt"] if selection else []
        lines += [f"- `{name}`: {count:,} captioned images{', chosen by rules:' if rules else ''}"]
        lines += [f"  - `{rule.replace('`', ' ')}`" for rule in rules]
    return "\n".join(lines) + f"\n- captions embedded by {_encoder(checkpoint.text)}"


def _license(config: dict, license: str) -> str:
    text = f"{license}." if license != "other" else "Not stated by who exported it; ask before use."
    if config["init_from"]:
        name = _public_name(config["init_from"])
        text += f" The training began from `{name}`, whose licence applies to these weights too."
    return text + " The licence of the data is its owners'."


def _public_name(location: str) -> str:
    """A name on the hub as it is; of a path or URL its last part, which reveals nothing about a machine."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@\w[\w./-]*)?", location) and not location.startswith("."):
        return location
    return re.split(r"[/\\]", location.rstrip("/\\").partition("?")[0])[-1]


def _without_paths(config: dict, above: str = "") -> dict:
    """The configuration without the keys of PRIVATE.  above: the dotted key of this part of it, with a dot."""
    return {
        key: _without_paths(value, f"{above}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if not PRIVATE.fullmatch(above + key)
    }
