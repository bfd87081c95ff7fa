"""Captions of the datasets as prompts for sampling, with their embeddings."""

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from data.config import ImageRules
from data.images import preprocess
from data.loader.cursor import ShardCursor
from data.loader.dataset import Dataset
from data.storage.machine import raise_if_machine
from data.text.decode import decode_caption
from data.text.embeddings import from_bytes
from data.text.meta import TextMeta

logger = logging.getLogger(__name__)
T = TypeVar("T")


def stored_prompts(datasets: list[Dataset], meta: TextMeta, n: int) -> list[tuple[str, np.ndarray]]:
    """At most n captions, taken evenly from all shards, with their embeddings [tokens, dim], read or encoded.

    Of several captions of a sample it is the first, in the order of data.captions, that the sample has.
    A sample that cannot be read is left out. Raises: ValueError if none of the n can be read.
    """
    return [(caption, text_emb) for caption, text_emb, _ in _stored(datasets, meta, n, lambda image: None)]


def prompts_with_low_res(
    datasets: list[Dataset], meta: TextMeta, n: int, size: int, rules: ImageRules
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """As stored_prompts, each with its image, cropped in the centre, uint8 [3, size, size].

    rules: which images are decoded.
    """
    unused = np.random.default_rng(0)  # without a shift the draws change nothing
    return _stored(datasets, meta, n, lambda image: preprocess(image, size, 0.0, unused, rules))


def _stored(
    datasets: list[Dataset], meta: TextMeta, n: int, picture: Callable[[bytes], T]
) -> list[tuple[str, np.ndarray, T]]:
    """Captions, embeddings, and what `picture` makes of the bytes of the image."""
    shards = [(number, dataset) for dataset in datasets for number in range(len(dataset.shards))]
    ends = np.cumsum([0, *(count for dataset in datasets for count in dataset.counts)])
    prompts = []
    for index in np.unique(np.arange(n) * int(ends[-1]) // n).tolist():
        place = int(np.searchsorted(ends, index, side="right")) - 1
        number, dataset = shards[place]
        encoder = dataset.encoder
        shard, folder, online = dataset.shards[number], "" if encoder else dataset.text, encoder is not None
        cursor = ShardCursor(shard, folder, needs_caption=online, captions=dataset.captions)
        raw = cursor.read(int(dataset.rows(number)[index - ends[place]]))
        cursor.close()
        try:
            caption = decode_caption(raw.caption)
            if encoder and not raw.problem:
                text_emb = encoder([caption])[0].astype(meta.array_dtype)
            else:
                text_emb = from_bytes(raw.embedding, meta)
            prompts.append((caption, text_emb, picture(raw.image)))
        except (ValueError, OSError) as problem:
            if isinstance(problem, OSError):
                raise_if_machine(problem, raw.name)
            reason = " ".join(str(raw.problem or problem).split())
            logger.warning("%s cannot serve as a prompt: %s", raw.name, reason[:200])
    if not prompts:
        raise ValueError(
            f"none of {n} samples, taken evenly from {len(shards)} shards, can be read: look at the shards"
        )
    return prompts
