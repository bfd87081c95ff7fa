"""What a run needs from outside, looked for before any training, and the run in words."""

from dataclasses import dataclass

import torch

from data.shards import Shard, find_shards
from data.text import TextMeta, check_sidecars, read_empty
from model.unet import UNet
from train.config import Config, accumulation


@dataclass(slots=True)
class Inputs:
    """The shards of a run and the meta of their embeddings."""

    shards: list[Shard]
    meta: TextMeta

    @property
    def samples(self) -> int:
        """Samples in the dataset."""
        return sum(shard.count for shard in self.shards)


def find_inputs(config: Config) -> Inputs:
    """Raises: ValueError if shards or embeddings are missing or don't fit the model."""
    shards = find_shards(config.data.shards)
    meta = check_sidecars(shards, config.data.text, config.data.tokens, config.model.encoder_dim)
    read_empty(config.data.text, meta)
    return Inputs(shards, meta)


def parameters(config: Config) -> int:
    """Number of parameters of the model, counted without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config.model).parameters())


def describe(config: Config, ranks: int) -> str:
    """The resolved run in a few lines; data that is not there is said, not raised."""
    try:
        inputs = find_inputs(config)
        data = f"{len(inputs.shards)} shards, {inputs.samples:,} samples in {config.data.shards}"
        epochs = f", {config.steps * config.global_batch / inputs.samples:.2f} epochs"
        text = (
            f"{inputs.meta.encoder}, {inputs.meta.tokens} x {inputs.meta.dim} {inputs.meta.dtype} in {config.data.text}"
        )
    except ValueError as error:
        data, epochs, text = f"none usable yet: {error}", "", "-"
    accumulate, optim = accumulation(config, ranks), config.optim
    variance = "learned" if config.model.learn_sigma else "fixed"
    lines = {
        "run": config.run_dir,
        "global batch": f"{ranks} ranks x {config.micro_batch} micro batch x {accumulate} accumulation "
        f"= {config.global_batch}",
        "model": f"{parameters(config):,} parameters, {config.model.image_size} px, {config.precision}",
        "diffusion": f"{config.diffusion_steps} steps, cosine betas, {variance} variance",
        "steps": f"{config.steps:,}, {config.steps * config.global_batch:,} images{epochs}",
        "lr": f"{optim.lr_start:g} -> {optim.lr_peak:g} in {optim.warmup_steps:,} steps -> {optim.lr_end:g}, "
        "OneCycle cosine",
        "optimizer": f"{optim.name}, ZeRO-1, betas {tuple(optim.betas)}, decay {optim.weight_decay:g}, "
        f"clip {optim.grad_clip:g}",
        "captions": f"{config.data.tokens} tokens, {config.data.cond_drop_prob:.0%} dropped to the empty one",
        "data": data,
        "embeddings": text,
    }
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())
