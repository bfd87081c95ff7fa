"""What a run needs from outside, looked for before any training, and the run in words."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Batch
from data.config import Dataset, find_datasets
from data.mixture import share_out
from data.text import TextMeta, check_meta, check_sidecars, read_empty
from model.unet import UNet
from train.adapter import add_lora
from train.checkpoint import complete
from train.config import Config, accumulation
from train.pretrained import load_pretrained

if TYPE_CHECKING:  # it takes seconds to import, and only text.mode=online has need of it
    from data.encoder import TextEncoder


@dataclass(slots=True)
class Inputs:
    """The datasets of a run, the meta of their embeddings, and on the first rank the weights to begin with, if any.

    encoder: what makes the embeddings, where they are not stored.
    """

    datasets: list[Dataset]
    meta: TextMeta
    weights: dict[str, Tensor] | None = None
    encoder: "TextEncoder | None" = None

    def to(self, device: torch.device) -> None:
        """Bring the text encoder to the device, if the run has one."""
        if self.encoder:
            self.encoder.to(device)

    def text_emb(self, batch: Batch, device: torch.device) -> Tensor:
        """[N, L, D] of a batch on the device: as stored, or made there by the frozen encoder from the tokens."""
        if self.encoder:
            return self.encoder.states(batch.text_emb)
        return batch.text_emb.to(device, non_blocking=True)

    @property
    def samples(self) -> list[int]:
        """Samples in each dataset."""
        return [dataset.samples for dataset in self.datasets]


def begins_from_weights(config: Config) -> bool:
    """Whether all weights that are trained begin from some, there being no checkpoint to go on from."""
    return bool(config.init_from) and not config.lora.rank and not complete(Path(config.run_dir))


def find_inputs(config: Config, rank: int) -> Inputs:
    """Raises: ValueError if shards, embeddings or weights are missing or don't fit the model."""
    datasets = find_datasets(config.data)
    online = config.text.mode == "online"
    tokens, dim = config.data.tokens, config.model.encoder_dim
    metas = [
        check_meta(d.text, tokens, dim) if online else check_sidecars(d.shards, d.text, tokens, dim) for d in datasets
    ]
    for dataset, meta in zip(datasets, metas, strict=True):
        if meta != metas[0]:
            raise ValueError(
                f"the embeddings in '{dataset.text}' were made otherwise than those in '{datasets[0].text}': "
                "embed the captions of both with one encoder and its settings (meta.json)"
            )
        read_empty(dataset.text, meta)
    encoder = _load_encoder(config, datasets, metas[0]) if online else None
    weights = None
    if rank == 0 and (begins_from_weights(config) or config.lora.rank):
        weights = load_pretrained(config.init_from, config.model)
    return Inputs(datasets, metas[0], weights, encoder)


def _load_encoder(config: Config, datasets: list[Dataset], meta: TextMeta) -> "TextEncoder":
    from data.encoder import load_encoder

    # Loader workers take one caption at a time; threads of the tokenizer do not outlive their fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = load_encoder(meta, config.text.encoder)
    for dataset in datasets:
        dataset.encoder = encoder
    return encoder


def parameters(config: Config) -> tuple[int, int]:
    """Number of parameters that are trained, and of those that are frozen, counted without memory for them."""
    with torch.device("meta"):
        unet = UNet(config.model)
        if config.lora.rank:
            add_lora(unet, config.lora, on_meta=True)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in unet.parameters()) - trained


def describe(config: Config, ranks: int) -> str:
    """The resolved run in a few lines; data that is not there is said, not raised."""
    try:
        inputs = find_inputs(config, rank=0)
        sizes = share_out(config.global_batch, [dataset.weight for dataset in inputs.datasets])
        data = "; ".join(
            f"{len(found.shards)} shards, {found.samples:,} samples in {told.shards}, "
            f"{size} of a batch, {config.steps * size / found.samples:.2f} epochs"
            for found, told, size in zip(inputs.datasets, config.data.datasets(), sizes, strict=True)
        )
        meta = inputs.meta
        kept = f"made online in {meta.compute}, as" if inputs.encoder else f"{meta.dtype} in"
        where = ", ".join(dataset.text for dataset in inputs.datasets)
        text = f"{meta.encoder}, {meta.tokens} x {meta.dim}, {kept} {where}"
    except ValueError as error:
        data, text = f"none usable yet: {error}", "-"
    accumulate, optim = accumulation(config, ranks), config.optim
    variance = "learned" if config.model.learn_sigma else "fixed"
    trained, frozen = parameters(config)
    beside = f" of LoRA, rank {config.lora.rank}, beside {frozen:,} that are frozen" if frozen else ""
    lines = {
        "run": config.run_dir,
        "global batch": f"{ranks} ranks x {config.micro_batch} micro batch x {accumulate} accumulation "
        f"= {config.global_batch}",
        "model": f"{trained:,} parameters{beside}, {config.model.image_size} px, {config.precision}",
        "begins with": config.init_from or "random weights",
        "diffusion": f"{config.diffusion_steps} steps, cosine betas, {variance} variance",
        "steps": f"{config.steps:,}, {config.steps * config.global_batch:,} images",
        "lr": f"{optim.lr_start:g} -> {optim.lr_peak:g} in {optim.warmup_steps:,} steps -> {optim.lr_end:g}, "
        "OneCycle cosine",
        "optimizer": f"{optim.name}, ZeRO-1, betas {tuple(optim.betas)}, decay {optim.weight_decay:g}, "
        f"clip {optim.grad_clip:g}",
        "captions": f"{config.data.tokens} tokens, {config.data.cond_drop_prob:.0%} dropped to the empty one",
        "data": data,
        "embeddings": text,
    }
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())
