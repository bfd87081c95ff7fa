"""Writing a sidecar: the text embeddings of one shard."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.storage.claims import Claim
from data.storage.digests import caption_digest
from data.storage.shards import Shard
from data.storage.tars import Sample, Span, read_shard, write_stats, write_tar
from data.text.embeddings import encode_states, to_bytes
from data.text.encoder import TextEncoder
from data.text.meta import sidecar_location
from data.text.prefetch import prefetch
from data.text.sidecar_record import SidecarRecord

# How many batches the tokenizer and the encoder may be ahead of the step that follows them.
TOKENIZED_AHEAD, ENCODED_AHEAD = 4, 2


@dataclass(slots=True)
class _CaptionBatch:
    """Some captions of a shard on their way to embeddings.

    kept: the embeddings that are taken over as they are, None for a caption that is to be encoded.
    without_caption: the samples among them that have no caption.
    ids, fetch_states: token ids and then the states of the captions that are to be encoded, None if there are none.
    """

    keys: list[str]
    digests: list[str]
    captions: list[str]
    kept: list[Span | None]
    without_caption: int
    ids: Tensor | None = None
    fetch_states: Callable[[], Tensor] | None = None

    @property
    def to_encode(self) -> list[str]:
        return [caption for caption, kept in zip(self.captions, self.kept, strict=True) if kept is None]


def write_sidecar(
    shard: Shard, out: Path, encoder: TextEncoder, dtype: str, batch: int, claim: Claim,
    progress: Callable[[int], object], valid: dict[str, Span | None] | None = None,
) -> int:  # fmt: skip
    """Embed the captions of a shard. Returns how many samples have no caption. Only a few batches are in memory.

    progress: called with the number of captions of each batch that is done.
    valid: embeddings by key that are taken over as they are.
    Raises: ValueError if states are not finite or too large for the dtype; OSError.
    """
    record, without_caption = SidecarRecord(), 0

    def samples() -> Iterator[Sample]:
        nonlocal without_caption
        read = _read_captions(shard, batch, valid or {})
        tokenized = prefetch(_tokenize(read, encoder), TOKENIZED_AHEAD)
        for part in prefetch(_start_encoding(tokenized, encoder), ENCODED_AHEAD):
            without_caption += part.without_caption
            states = iter(_finite_states(part, encoder))
            for key, digest, caption, kept in zip(part.keys, part.digests, part.captions, part.kept, strict=True):
                npy = to_bytes(_stored(next(states), dtype, caption)) if kept is None else kept.read()
                record.add(digest, npy)
                yield key, {"npy": npy}
            claim.renew()
            progress(len(part.keys))

    path = Path(sidecar_location(shard, out))
    count = write_tar(path, samples(), claim.aside)
    write_stats(path, count, record.stats())
    return without_caption


def _read_captions(shard: Shard, batch: int, valid: dict[str, Span | None]) -> Iterator[_CaptionBatch]:
    samples = read_shard(shard.location, {"txt"})
    while some := list(islice(samples, batch)):
        captions = [(key, members["txt"]) for key, members in some if "txt" in members]
        yield _CaptionBatch(
            keys=[key for key, _ in captions],
            digests=[caption_digest(key, caption) for key, caption in captions],
            captions=[caption.decode("utf-8", "replace") for _, caption in captions],
            kept=[valid.get(key) for key, _ in captions],
            without_caption=len(some) - len(captions),
        )


def _tokenize(batches: Iterable[_CaptionBatch], encoder: TextEncoder) -> Iterator[_CaptionBatch]:
    for batch in batches:
        if captions := batch.to_encode:
            batch.ids = torch.from_numpy(encoder.token_ids(captions))
        yield batch


def _start_encoding(batches: Iterable[_CaptionBatch], encoder: TextEncoder) -> Iterator[_CaptionBatch]:
    # All captions are padded to the full length: IF is given the states at the padding too, and they cost the same.
    for batch in batches:
        if batch.ids is not None:
            batch.fetch_states = encoder.start(batch.ids)
        yield batch


def _finite_states(batch: _CaptionBatch, encoder: TextEncoder) -> np.ndarray:
    """[N, tokens, dim] float32 of the captions that are to be encoded. Raises: ValueError if they are not finite."""
    if batch.fetch_states is None:
        return np.empty(0)
    states = batch.fetch_states()
    encoder.check_finite(states, batch.to_encode)
    return states.float().numpy()


def _stored(states: np.ndarray, dtype: str, caption: str) -> np.ndarray:
    try:
        return encode_states(states, dtype)
    except ValueError as error:
        raise ValueError(f"the caption {caption[:80]!r} has {error}: use dtype=bfloat16 or float32") from None
