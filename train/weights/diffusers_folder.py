"""A checkpoint as the folder of a diffusers pipeline, that of its stage of IF. The command is train.export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import T5EncoderModel

from data.text.encoder import TextEncoder, load_encoder
from data.text.meta import TextMeta
from model.config import UNetConfig
from model.convert import diffusers_config, each_to_diffusers
from train.checkpoint.checkpoint import Checkpoint
from train.sampling.sampler import make_scheduler
from train.weights.pretrained import net_weights

# IFPipeline, as that of the second stage, pads every prompt to this many tokens, whatever its tokenizer says.
IF_TOKENS = 77


def build_pipeline(
    checkpoint: Checkpoint, weights: str, dtype: torch.dtype, encoder: TextEncoder | None
) -> IFPipeline | IFSuperResolutionPipeline:
    """The pipeline of a checkpoint's net, for its stage.  weights: 'ema' or 'master'.  dtype: of the UNet.

    Raises: ValueError, as net_weights and build_unet.
    """
    net, steps = checkpoint.model, checkpoint.diffusion_steps
    parts: dict[str, Any] = {
        "tokenizer": encoder.tokenizer if encoder else None,
        # Always float32: loaded without a dtype, the UNet becomes float32 and the encoder what it was saved in, and
        # the pipelines fail when they differ.
        "text_encoder": encoder.model.float() if encoder else None,
        "unet": build_unet(net_weights(checkpoint, weights), net, dtype),
        "scheduler": make_scheduler(steps, net.learn_sigma, second_stage=net.low_res_size > 0),
        "safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,
    }  # fmt: skip
    if not net.low_res_size:
        return IFPipeline(**parts)
    noising = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
    return IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, shard_size: str) -> None:
    """Write the pipeline's files into a folder, all with the same permissions.  shard_size: of the weights, as '10GB'.

    Raises: OSError or SafetensorError if they cannot be written.
    """
    pipeline.save_pretrained(folder, max_shard_size=shard_size)
    # safetensors makes files that only their owner may read; a model is for others too.
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "model_index.json").stat().st_mode)


def build_unet(weights: dict[str, Tensor], config: UNetConfig, dtype: torch.dtype) -> UNet2DConditionModel:
    """diffusers' net with these weights; they are removed from the dict one by one, so only one copy is in memory.

    A net without a learned variance gets its output channels too, all zero: IFPipeline splits them off in any case.
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
    """The encoder of the training, checked that IFPipeline will use it as the training did.

    name: its folder or its name on the hub, 'auto' for what the meta says.
    Raises: ValueError.
    """
    remedy = "export without encoder= and give the pipeline prompt_embeds"
    if meta.tokens != IF_TOKENS:
        raise ValueError(
            f"IFPipeline pads prompts to {IF_TOKENS} tokens, this net was trained with {meta.tokens}: {remedy}"
        )
    encoder = load_encoder(meta, "" if name == "auto" else name)
    if not isinstance(encoder.model, T5EncoderModel):
        raise ValueError(f"'{name}' is a {type(encoder.model).__name__}, IFPipeline takes a T5 alone: {remedy}")
    return encoder
