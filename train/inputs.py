"""What a run needs from outside, looked for before any training, and the run in words."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.loader.batch import Batch
from data.loader.dataset import Dataset, find_datasets
from data.text.embeddings import read_empty
from data.text.meta import TextMeta, check_meta, check_sidecars
from train.checkpoint.format import latest_checkpoint
from train.config import Config
from train.weights.pretrained import load_pretrained

if TYPE_CHECKING:  # it takes seconds to import, and only text.mode=online has need of it
    from data.text.encoder import TextEncoder


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
    return bool(config.init_from) and not config.lora.rank and not latest_checkpoint(Path(config.run_dir))


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
    from data.text.encoder import load_encoder

    # Loader workers take one caption at a time; threads of the tokenizer do not outlive their fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = load_encoder(meta, config.text.encoder)
    for dataset in datasets:
        dataset.encoder = encoder
    return encoder
