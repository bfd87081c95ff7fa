"""Writing a sidecar: the text embeddings of one shard."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.claims import Claim
from data.storage.digests import ShardDigest
from data.storage.locations import file_size
from data.storage.machine import raise_if_machine
from data.storage.object_claims import ObjectClaim
from data.storage.shards import Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import Sample, Span, read_shard, sample_name, write_stats, write_tar
from data.text.decode import decode_caption
from data.text.embeddings import store
from data.text.encoder import TextEncoder
from data.text.meta import TextMeta, sidecar_location
from data.text.prefetch import prefetch
from data.text.sidecar_record import SidecarRecord

# How many batches the tokenizer and the encoder may be ahead of the step that follows them.
TOKENIZED_AHEAD, ENCODED_AHEAD = 4, 2


class UnreadableShard(ValueError):
    """A shard cannot be read to its end, so its captions cannot be embedded."""


@dataclass(slots=True)
class Written:
    """What a sidecar was made of: captions that were embedded, embeddings that were kept, samples without a caption.

    not_text: SHARD:KEY of each sample whose caption is not UTF-8. It has no embedding.
    cleaned_away: SHARD:KEY of each caption of which the cleaning leaves nothing. Its embedding is the empty caption's.
    """

    embedded: int = 0
    kept: int = 0
    without_caption: int = 0
    not_text: list[str] = field(default_factory=list)
    cleaned_away: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _CaptionBatch:
    """Some captions of a shard on their way to embeddings.

    kept: the embeddings that are taken over as they are, None for a caption that is to be encoded.
    ids, fetch_states: token ids and then the states of the captions that are to be encoded, None if there are none.
    """

    keys: list[str]
    digests: list[str]
    captions: list[str]
    kept: list[Span | None]
    ids: Tensor | None = None
    fetch_states: Callable[[], Tensor] | None = None

    @property
    def to_encode(self) -> list[str]:
        return [caption for caption, kept in zip(self.captions, self.kept, strict=True) if kept is None]


def write_sidecar(
    shard: Shard, out: str, encoder: TextEncoder, meta: TextMeta, batch: int, claim: Claim | ObjectClaim,
    progress: Callable[[int], object], valid: dict[str, Span | None] | None = None, caption: str = TXT,
) -> Written:  # fmt: skip
    """Embed the captions of a shard. Only a few batches are in memory.

    out: the folder of the sidecars of this caption field.
    progress: called with the number of captions of each batch that is done.
    valid: embeddings by caption_digest that are taken over as they are.
    Raises: UnreadableShard; MachineError; ValueError if states are not finite or too large for the dtype; OSError.
    """
    record, written, source = SidecarRecord(), Written(), ShardDigest()

    def samples() -> Iterator[Sample]:
        read = _read_captions(shard, caption, batch, valid or {}, source, written)
        tokenized = prefetch(_tokenize(read, encoder, shard.name, written), TOKENIZED_AHEAD)
        for part in prefetch(_start_encoding(tokenized, encoder), ENCODED_AHEAD):
            states = iter(_finite_states(part, encoder))
            lengths = iter([] if part.ids is None else (part.ids >= 0).sum(1).tolist())
            for key, digest, text, kept in zip(part.keys, part.digests, part.captions, part.kept, strict=True):
                npy = _stored(next(states), next(lengths), meta, text) if kept is None else kept.read()
                record.add(digest, npy)
                yield key, {"npy": npy}
            claim.renew()
            progress(len(part.keys))

    sidecar = sidecar_location(shard, out)
    count = write_tar(sidecar, samples(), claim.aside)
    record.source, record.size = source.hexdigest(), file_size(sidecar)
    write_stats(sidecar, count, record.stats())
    return written


def _read_captions(
    shard: Shard, field: str, batch: int, valid: dict[str, Span | None], source: ShardDigest, written: Written
) -> Iterator[_CaptionBatch]:
    """The captions of a field in batches; counts them in `written`, and adds all samples to `source`."""
    part = _CaptionBatch([], [], [], [])
    try:
        for key, members in read_shard(shard.location, caption_extensions([field])):
            caption = find_captions(members, [field]).get(field)
            digest = source.add(key, caption)
            if caption is None:
                written.without_caption += 1
                continue
            try:
                text = decode_caption(caption)
            except ValueError:
                written.not_text.append(sample_name(shard.name, key))
                continue
            kept = valid.get(digest)
            written.embedded, written.kept = written.embedded + (kept is None), written.kept + (kept is not None)
            part.keys.append(key)
            part.digests.append(digest)
            part.captions.append(text)
            part.kept.append(kept)
            if len(part.keys) == batch:
                yield part
                part = _CaptionBatch([], [], [], [])
    except DamagedTar as error:
        raise UnreadableShard(str(error)) from None
    except OSError as error:
        raise_if_machine(error, shard.location)
        raise UnreadableShard(error.strerror or str(error)) from None
    if part.keys:
        yield part


def _tokenize(
    batches: Iterable[_CaptionBatch], encoder: TextEncoder, shard_name: str, written: Written
) -> Iterator[_CaptionBatch]:
    """Add the token ids; names the captions in `written` that have no tokens beyond the encoder's special ones."""
    special = encoder.tokenizer.num_special_tokens_to_add()
    for batch in batches:
        if captions := batch.to_encode:
            batch.ids = torch.from_numpy(encoder.token_ids(captions))
            fresh = [key for key, kept in zip(batch.keys, batch.kept, strict=True) if kept is None]
            tokens = (batch.ids >= 0).sum(1).tolist()
            written.cleaned_away += [
                sample_name(shard_name, key)
                for key, caption, count in zip(fresh, captions, tokens, strict=True)
                if count <= special and caption.strip()
            ]
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


def _stored(states: np.ndarray, length: int, meta: TextMeta, caption: str) -> bytes:
    try:
        return store(states, length, meta)
    except ValueError as error:
        raise ValueError(f"the caption {caption[:80]!r} has {error}: use dtype=bfloat16 or float32") from None
