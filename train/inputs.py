"""What a run needs from outside, found and checked before any training: data, embeddings, weights to begin from."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.checks import count
from data.loader.batch import Batch
from data.loader.dataset import Dataset, check_captions, find_datasets, validation_datasets
from data.loader.mixture import share_out
from data.storage.hub import as_recorded
from data.storage.locations import absolute
from data.storage.shards import find_shards
from data.text.embeddings import read_empty
from data.text.lowrank_product import LowrankProduct
from data.text.meta import LOWRANK, TextMeta, check_meta, check_sidecars
from data.text.state_cache import StateCache, cache_bytes
from model.config import MIN_GROUP_CHANNELS
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.identity import DataIdentity, data_digest, describe_selection, weights_digest
from train.compose import follow_data, sizes_to_set
from train.config import Config
from train.faults.first_rank import of_first_rank, raise_on_all
from train.weights.pretrained import load_pretrained, pinned_weights

if TYPE_CHECKING:  # it takes seconds to import, and only text.mode=online needs it
    from data.text.encoder import TextEncoder

logger = logging.getLogger(__name__)

GB = 1e9
# Tokens and width of the text states of T5-XXL, which the released nets were trained on.
RELEASED_TEXT = (77, 4096)


@dataclass(slots=True)
class Inputs:
    """The datasets of a run, the meta of their embeddings, and on the first rank the weights to begin from, if any.

    from_weights: whether all weights that are trained begin from some, there being no checkpoint to go on from.
    encoder: makes the embeddings where they are not stored.  cache: keeps what it made, if asked for.
    product: makes them of what is stored as lowrank.
    base: weights_digest of the net that a LoRA is added to, '' without LoRA.
    held_out: the samples of the validation, if the run has one.
    prompts: on the first rank the captions of one's own for the sample grids, if any, with embeddings [tokens, dim].
    sizes: on the first rank which sizes of the configuration follow the data, in a line; '' for none.
    """

    datasets: list[Dataset]
    meta: TextMeta
    weights: dict[str, Tensor] | None = None
    from_weights: bool = False
    encoder: "TextEncoder | None" = None
    product: LowrankProduct | None = None
    base: str = ""
    held_out: list[Dataset] = field(default_factory=list)
    prompts: list[tuple[str, np.ndarray]] = field(default_factory=list)
    sizes: str = ""
    cache: StateCache | None = None

    def to(self, device: torch.device) -> None:
        """Move what makes the embeddings to the device, if the run has that."""
        if self.encoder:
            self.encoder.to(device)
        elif self.meta.dtype == LOWRANK:
            for dataset in (*self.datasets, *self.held_out):
                TextMeta.read(dataset.text)  # makes its channels known
            self.product = LowrankProduct(read_empty(self.datasets[0].text, self.meta), device)

    def text_emb(self, loaded: Tensor, on_host: Batch | None = None) -> Tensor:
        """[N, L, D] of a batch's text_emb on the device: as loaded, or made of its tokens or of its factors.

        on_host: the batch as it came, for the cache, which without it is not asked.
        """
        if self.cache and on_host:
            return self.cache.states(loaded, on_host.text_emb)
        source = self.encoder or self.product
        return source.states(loaded) if source else loaded

    def pop_counts(self) -> dict[str, float]:
        """What this rank's cache did since the last call; {} without a cache."""
        return {"text_cache_share": self.cache.pop_share()} if self.cache else {}

    @property
    def identity(self) -> DataIdentity:
        """What a checkpoint keeps of the inputs, so that the run goes on with no others."""
        samples, digests = [d.samples for d in self.datasets], [data_digest(d) for d in self.datasets]
        return DataIdentity(samples, digests, self.meta, self.base, [describe_selection(d) for d in self.datasets])


def find_inputs(config: Config, readable_only: bool = False) -> Inputs:
    """Find and check everything; sets what of the configuration follows the data: the embeddings' shape, and sizes.

    Names on the hub in init_from and text.encoder are replaced by those with their commits, which the run records.

    readable_only: only whether data and embeddings can be read here, without the weights and prompts of a training.
    Raises: ValueError if shards, embeddings or weights are missing or don't fit the model.
    """
    if config.model.group_channels < MIN_GROUP_CHANNELS:
        logger.warning(
            "model.norm_groups=%d leaves %d channels a group at the narrowest level: with fewer than %d, a norm "
            "removes much of the mean of each channel, and colours suffer; %d groups are right",
            config.model.norm_groups, config.model.group_channels, MIN_GROUP_CHANNELS,
            min(config.model.widths) // MIN_GROUP_CHANNELS,
        )  # fmt: skip
    datasets = find_datasets(config.data)
    if told := follow_data(config, sum(dataset.samples for dataset in datasets)):
        logger.info(told)
    held_out = _find_held_out(config, datasets)
    online = config.text.mode == "online"
    tokens, dim = config.data.tokens, config.model.encoder_dim
    if not readable_only:
        check_captions(datasets)
    metas = [
        check_meta(d.text, tokens, dim)
        if online or readable_only
        else check_sidecars(d.shards, d.text, tokens, dim, d.fields)
        for d in (*datasets, *held_out)
    ]
    for dataset, meta in zip((*datasets, *held_out), metas, strict=True):
        if meta != metas[0]:
            raise ValueError(
                f"the embeddings in '{dataset.text}' were made otherwise than those in '{datasets[0].text}': "
                "embed the captions of both with one encoder and its settings (meta.json)"
            )
        read_empty(dataset.text, meta)
    _set_text_shape(config, *metas[0].shape)
    encoder = _load_encoder(config, [*datasets, *held_out], metas[0]) if online else None
    found = Inputs(datasets, metas[0], encoder=encoder, held_out=held_out, sizes=told)
    found.cache = _make_cache(config, found)
    if readable_only:
        return found
    _warn_of_seen(datasets, held_out)
    _check_selections(config, datasets)
    if isinstance(config.sample.prompts, list):
        found.prompts = _encode_prompts(config, metas[0], encoder)
    if config.init_from:
        pin_init_from(config, found)
    if found.from_weights or config.lora.rank:
        found.weights = load_pretrained(config.init_from, config.model)
        found.base = weights_digest(found.weights) if config.lora.rank else ""
    return found


def share_inputs(config: Config, found: Inputs | None) -> Inputs | None:
    """The first rank's inputs on all ranks, None if it found none; a collective call.

    The others look at no shard and no checkpoint: 512 ranks that each did would keep a file system busy. They load the
    text encoder, if there is one, and set what of the configuration follows the data as find_inputs does.
    found: of the first rank; the weights and the prompts stay there.
    Raises: ValueError on all ranks if one of them cannot load the encoder.
    """

    def to_share() -> Inputs | None:
        if found is None:
            return None
        datasets, held_out = (
            [replace(dataset, encoder=None) for dataset in part] for part in (found.datasets, found.held_out)
        )
        return replace(found, datasets=datasets, held_out=held_out, weights=None, encoder=None, cache=None, prompts=[])

    shared = of_first_rank(lambda: (to_share(), config.init_from, config.text.encoder))
    inputs, config.init_from, config.text.encoder = shared
    fault = ""
    if inputs is None:
        return None
    if dist.get_rank() == 0:
        inputs = found
    else:
        _set_text_shape(config, *inputs.meta.shape)
        follow_data(config, sum(dataset.samples for dataset in inputs.datasets))
        try:
            inputs.encoder = (
                _load_encoder(config, [*inputs.datasets, *inputs.held_out], inputs.meta)
                if config.text.mode == "online"
                else None
            )
            inputs.cache = _make_cache(config, inputs)
        except (OSError, ValueError) as error:
            fault = f"rank {dist.get_rank()}: {error}"
    raise_on_all(fault)
    return inputs


def pin_init_from(config: Config, found: Inputs) -> None:
    """Name the commit of weights on the hub, that of the run's checkpoint if there is one; and say if all begin there.

    Raises: ValueError.
    """
    earlier = Checkpoint.latest(Path(config.run_dir))
    found.from_weights = not earlier and not config.lora.rank
    recorded = earlier.config["init_from"] if earlier else ""
    if found.from_weights or config.lora.rank:
        config.init_from = pinned_weights(config.init_from, recorded)
    else:
        config.init_from = as_recorded(config.init_from, recorded)


def _find_held_out(config: Config, datasets: list[Dataset]) -> list[Dataset]:
    """The samples of the validation, none if there is none. Raises: ValueError if they are missing."""
    if not config.validate_every:
        return []
    given = config.data.validation
    if given.share:
        held_out = validation_datasets(datasets)
        if not held_out:
            raise ValueError(f"data.validation.share={given.share} holds no sample apart: raise it")
        return held_out
    try:
        # Of several captions the first is enough, so the others need no embeddings here.
        return [Dataset(find_shards(given.shards), given.text, captions=config.data.captions[:1])]
    except ValueError as error:
        raise ValueError(f"data.validation.shards: {error}") from None


def _warn_of_seen(datasets: list[Dataset], held_out: list[Dataset]) -> None:
    """Warn of held-out shards that the run is trained on, by their places or their contents."""
    trained = [shard for dataset in datasets for shard in dataset.shards]
    places, digests = {absolute(shard.location) for shard in trained}, {shard.digest for shard in trained} - {None}
    shards = [shard for dataset in held_out if not dataset.held for shard in dataset.shards]
    seen = [shard for shard in shards if absolute(shard.location) in places or shard.digest in digests]
    if seen:
        logger.warning(
            "%d of %d shards of data.validation are shards of the training too (first: %s): on what it is trained on, "
            "a net is better than on what it has not seen", len(seen), len(shards), seen[0].location,
        )  # fmt: skip


def _check_selections(config: Config, datasets: list[Dataset]) -> None:
    """Log what the rules took. Raises: ValueError if they leave a dataset less than its share of one batch."""
    sizes = share_out(config.global_batch, [dataset.weight for dataset in datasets])
    for dataset, given, size in zip(datasets, config.data.datasets(), sizes, strict=True):
        if dataset.selection is None:
            continue
        lines = dataset.selection.receipt.lines()
        if dataset.samples < size:
            raise ValueError(
                f"of {given.shards} {count(dataset.samples, 'sample')} are chosen ({'; '.join(lines)}), less than the "
                f"{size} of one batch: loosen the rules, or lower global_batch"
            )
        logger.info("%s: %s", given.shards, "; ".join(lines))


def _encode_prompts(config: Config, meta: TextMeta, encoder: "TextEncoder | None") -> list[tuple[str, np.ndarray]]:
    """The captions of sample.prompts, each with its embedding [tokens, dim].

    Raises: ValueError if the run's encoder is not here.
    """
    from data.text.encoder import load_encoder

    try:
        encoder = encoder or _named(config, load_encoder(meta, config.text.encoder))
    except ValueError as error:
        raise ValueError(
            f"sample.prompts are captions of your own, which need the encoder of the embeddings: {error}; name its "
            "folder in text.encoder, or give a number of captions of the data"
        ) from None
    return list(zip(config.sample.prompts, encoder(config.sample.prompts), strict=True))


def resolve_text_shape(config: Config) -> bool:
    """Set data.tokens and model.encoder_dim if not given, for a run that is described before its data need be there.

    They are those of the embeddings' meta.json; without one they are taken to be T5-XXL's, 77 and 4096.
    Returns whether they are taken to be T5-XXL's.
    Raises: ValueError if there is no meta.json and T5-XXL's width does not fit the net.
    """
    if config.data.tokens and config.model.encoder_dim:
        return False
    try:
        shape, assumed = TextMeta.read(config.data.datasets()[0].text).shape, False
    except ValueError:
        shape, assumed = RELEASED_TEXT, True
        if shape[1] % config.model.att_pool_heads:
            raise
    _set_text_shape(config, *shape)
    return assumed


def resolve_sizes(config: Config, otherwise: int) -> str:
    """Set the sizes that follow the data, for a run that is described before its data need be there.

    otherwise: number of samples where the datasets cannot be read.
    Returns what was set, in a line, and why the number of samples is assumed if it is; '' for nothing.
    """
    if not sizes_to_set(config):
        return ""
    try:
        samples, why = sum(dataset.samples for dataset in find_datasets(config.data)), ""
    except (ValueError, OSError) as error:
        samples, why = otherwise, f" (samples={otherwise} is assumed: {error})"
    return follow_data(config, samples) + why


def _set_text_shape(config: Config, tokens: int, dim: int) -> None:
    config.data.tokens = config.data.tokens or tokens
    # Replaced and not set, since that checks whether the net fits the width.
    config.model = replace(config.model, encoder_dim=config.model.encoder_dim or dim)


def _load_encoder(config: Config, datasets: list[Dataset], meta: TextMeta) -> "TextEncoder":
    from data.text.encoder import load_encoder

    # Loader workers take one caption at a time; the tokenizer's threads do not survive their fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = _named(config, load_encoder(meta, config.text.encoder))
    for dataset in datasets:
        dataset.encoder = encoder
    return encoder


def _make_cache(config: Config, inputs: Inputs) -> StateCache | None:
    """The cache of text.cache_gb; None if none is asked for. Raises: ValueError if not all captions fit."""
    if not config.text.cache_gb or not inputs.encoder:
        return None
    # Of several captions of a sample each has states of its own, and so has the empty one.
    captions = sum(dataset.samples * len(dataset.fields) for dataset in inputs.datasets) + 1
    tokens, dim = inputs.meta.shape
    needed = cache_bytes(captions, tokens * dim * inputs.encoder.model.dtype.itemsize) / GB
    if needed > config.text.cache_gb:
        raise ValueError(
            f"text.cache_gb={config.text.cache_gb:g} is less than the {needed:.3g} GB of the states of "
            f"{count(captions, 'caption')}: of a part of them it would save next to nothing; raise it, set it to 0, or "
            "store the states with data.embed"
        )
    return StateCache(inputs.encoder, captions)


def _named(config: Config, encoder: "TextEncoder") -> "TextEncoder":
    """The encoder; where text.encoder names it on the hub, the commit is named too."""
    if config.text.encoder:
        config.text.encoder = encoder.name
    return encoder
