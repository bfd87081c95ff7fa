"""A checkpoint as a folder that diffusers' IFPipeline loads: `python -m train.export checkpoint=RUN_DIR out=DIR`."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import IFPipeline, UNet2DConditionModel
from omegaconf import MISSING
from safetensors import SafetensorError
from torch import Tensor
from transformers import T5EncoderModel

from data.cli import command
from data.text.encoder import TextEncoder, load_encoder
from data.text.meta import TextMeta
from model.config import UNetConfig
from model.convert import diffusers_config, each_to_diffusers
from train.sampling.sampler import make_scheduler
from train.weights.model_card import check_license, model_card
from train.weights.pretrained import load_whole, read_trained

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IF_TOKENS = 77  # IFPipeline pads every prompt to this, whatever its tokenizer says


@dataclass
class Export:
    """Writes a checkpoint as a folder that diffusers' IFPipeline loads.

    checkpoint: a run's folder, for its latest, or a step's folder. weights: ema or master. dtype: float32, float16 or
    bfloat16, of the UNet. encoder: the T5 that the captions were embedded with, where it lies now, or auto for the
    place that the checkpoint knows; none by default. license: of these weights, as the hub names it (apache-2.0, ...).
    """

    checkpoint: str = MISSING
    out: str = MISSING
    weights: str = "ema"
    dtype: str = "float32"
    encoder: str = ""
    license: str = "other"


def export(args: Export, shard_size: str = "10GB") -> None:
    """Write the folder aside, then rename.

    Raises: ValueError for what cannot be read, does not fit IFPipeline or is there already; OSError if it cannot be
    written.
    """
    out = Path(args.out)
    for name, value, known in (("weights", args.weights, ("ema", "master")), ("dtype", args.dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"{name}={value} must be one of {', '.join(known)}")
    if out.exists():
        raise ValueError(f"'{out}' is there already: choose another out=, or delete it")
    check_license(args.license)
    trained = read_trained(args.checkpoint)
    config, timesteps = trained.model, trained.diffusion_steps

    encoder = load_t5(args.encoder, trained.text) if args.encoder else None
    pipeline = IFPipeline(
        tokenizer=encoder.tokenizer if encoder else None,
        # In float32 whatever args.dtype: loaded without a dtype, the UNet becomes float32 and the encoder what it was
        # saved in, and IFPipeline fails when they differ.
        text_encoder=encoder.model.float() if encoder else None,
        unet=build_unet(load_whole(trained.folder, args.weights), config, DTYPES[args.dtype]),
        scheduler=make_scheduler(timesteps, config.learn_sigma),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip

    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        pipeline.save_pretrained(aside, max_shard_size=shard_size)
        # safetensors makes files that only their owner may read; a model is for others too.
        for file in aside.rglob("*.safetensors"):
            file.chmod((aside / "model_index.json").stat().st_mode)
        card = model_card(trained, out.name, args.weights, args.license, bool(encoder))
        (aside / "README.md").write_text(str(card), encoding="utf-8")
        os.replace(aside, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"'{out}' could not be written ({error}): make space, or choose another out=") from None
    variance = "learned" if config.learn_sigma else "fixed"
    text = "prompt_embeds alone"
    if encoder:
        text = f"prompts (clean_caption={encoder.cleaning != 'lower-strip'}, as in the training) or prompt_embeds"
    print(f"{out}: an IFPipeline for {text}; {args.weights} weights of step {trained.step} in {args.dtype}, "
          f"{config.image_size} px, {timesteps} diffusion steps, {variance} variance")  # fmt: skip


def build_unet(weights: dict[str, Tensor], config: UNetConfig, dtype: torch.dtype) -> UNet2DConditionModel:
    """diffusers' net with these weights, which are taken out of the dict one by one: in memory is one copy of them.

    A net without a learned variance gets its output channels all the same, all zero: IFPipeline splits them off
    whether there are any or not.
    Raises: ValueError if diffusers cannot express the net, or a weight is not finite in the dtype.
    """
    if not config.learn_sigma:
        config = replace(config, out_channels=2 * config.in_channels)
        idle = {name: torch.zeros_like(weights[name]) for name in ("out.2.weight", "out.2.bias")}
        weights = weights | {name: torch.cat([weights[name], zeros]) for name, zeros in idle.items()}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**diffusers_config(config))
    state = {}
    for ours, parts in each_to_diffusers(weights, config):
        for name, value in parts.items():
            state[name] = value.to(dtype)
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"{name} is not finite in {dtype}: choose another dtype, or an earlier checkpoint")
        del weights[ours]
    unet.load_state_dict(state, strict=True, assign=True)
    return unet


def load_t5(name: str, meta: TextMeta) -> TextEncoder:
    """The encoder of the training, once it is certain that IFPipeline will do with it what the training did.

    name: where it lies, 'auto' for where the meta says.
    Raises: ValueError.
    """
    without = "export without encoder= and give the pipeline prompt_embeds"
    if meta.tokens != IF_TOKENS:
        raise ValueError(
            f"IFPipeline pads prompts to {IF_TOKENS} tokens, this net was trained with {meta.tokens}: {without}"
        )
    encoder = load_encoder(meta, "" if name == "auto" else name)
    if not isinstance(encoder.model, T5EncoderModel):
        raise ValueError(f"'{name}' is a {type(encoder.model).__name__}, IFPipeline takes a T5 alone: {without}")
    return encoder


def main(argv: list[str] | None = None) -> None:
    command(export, Export, argv)


if __name__ == "__main__":
    main()
