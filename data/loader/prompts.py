"""Captions of the datasets as prompts for sampling, with their embeddings."""

import logging

import numpy as np

from data.loader.cursor import ShardCursor
from data.loader.dataset import Dataset
from data.storage.machine import raise_if_machine
from data.text.decode import decode_caption
from data.text.embeddings import from_bytes
from data.text.meta import TextMeta

logger = logging.getLogger(__name__)


def stored_prompts(datasets: list[Dataset], meta: TextMeta, n: int) -> list[tuple[str, np.ndarray]]:
    """At most n captions, taken evenly from all shards, with their embeddings [tokens, dim], read or encoded.

    Of several captions of a sample it is the first, in the order of data.captions, that the sample has.
    A sample that cannot be read is left out. Raises: ValueError if none of the n can be read.
    """
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
                prompts.append((caption, encoder([caption])[0].astype(meta.array_dtype)))
            else:
                prompts.append((caption, from_bytes(raw.embedding, meta)))
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
