"""Writing the embeddings of a shard, and finding out what is wrong with those that are there."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.storage.claims import Claim
from data.storage.locations import is_remote, join, list_names, open_location, read_bytes
from data.storage.shards import Shard
from data.storage.tar_headers import Damaged
from data.storage.tars import STATS, ShardReader, Span, read_shard, write_shard
from data.text.embeddings import encode_states, from_bytes, to_bytes
from data.text.encoder import TextEncoder
from data.text.meta import TextMeta, sidecar
from data.text.prefetch import prefetch

# What the stats file of a sidecar says of it beyond the counts: of each embedding, in their order, the hash of key and
# caption, 16 hex digits, and the checksum of the .npy, 8.
CAPTIONS, CHECKSUMS = "captions_blake2b", "npy_crc32"
# Batches that tokenizer and encoder are ahead of what comes after them.
TOKENIZED_AHEAD, ENCODED_AHEAD = 4, 2


@dataclass(slots=True)
class Found:
    """What a sidecar holds.  good: where the embeddings lie that are right.  The next fields name keys that are not.

    missing: without an embedding.  stale: of a caption that has changed since.  damaged: not as it was written.
    extra: without a caption.  order: whether the right ones are in another order than the samples.
    unreadable: why the sidecar can't be read at all, or no further.
    """

    shard: Shard
    captions: int = 0
    good: dict[str, Span] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    order: bool = True
    unreadable: str = ""

    def told(self) -> str:
        """What is wrong, in words; '' if nothing is."""
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what in ("missing", "stale", "damaged", "extra")
            if (keys := getattr(self, what))
        ]
        if not self.order:
            parts.append("in another order than the samples")
        return "; ".join([*parts, self.unreadable] if self.unreadable else parts)


@dataclass(slots=True)
class _Part:
    """Captions on their way: keys, hashes, texts; embeddings that are kept; token ids and then states of the others."""

    keys: list[str]
    digests: list[str]
    texts: list[str]
    kept: list[Span | None]
    ids: Tensor | None = None
    fetch: Callable[[], Tensor] | None = None

    @property
    def fresh(self) -> list[str]:
        return [text for text, kept in zip(self.texts, self.kept, strict=True) if kept is None]


def caption_digest(key: str, caption: bytes) -> str:
    """What tells whether the caption under a key has changed."""
    return hashlib.blake2b(key.encode() + b"\0" + caption, digest_size=8).hexdigest()


def write_sidecar(
    shard: Shard, out: Path, encoder: TextEncoder, dtype: str, batch: int, claim: Claim,
    progress: Callable[[int], object], good: dict[str, Span] | None = None,
) -> int:  # fmt: skip
    """Embed the captions of a shard; returns how many samples have none. In memory are a few batches, no more.

    good: embeddings by key that are taken as they are.
    Raises: ValueError if states are not finite or too large for the dtype; OSError.
    """
    without, records = [0], {CAPTIONS: "", CHECKSUMS: ""}

    def embeddings() -> Iterator[tuple[str, dict[str, bytes]]]:
        tokenized = prefetch(_tokenize(_parts(shard, batch, good or {}, without), encoder), TOKENIZED_AHEAD)
        digests, checksums = [], []
        for part in prefetch(_encode(tokenized, encoder), ENCODED_AHEAD):
            states = iter(_finite_states(part, encoder))
            for key, digest, text, kept in zip(part.keys, part.digests, part.texts, part.kept, strict=True):
                data = to_bytes(_packed(next(states), dtype, text)) if kept is None else kept.read()
                digests.append(digest)
                checksums.append(f"{zlib.crc32(data):08x}")
                yield key, {"npy": data}
            claim.renew()
            progress(len(part.keys))
        records[CAPTIONS], records[CHECKSUMS] = "".join(digests), "".join(checksums)

    write_shard(Path(sidecar(shard, out)), embeddings(), records, claim.aside)
    return without[0]


def _parts(shard: Shard, batch: int, good: dict[str, Span], without: list[int]) -> Iterator[_Part]:
    samples = read_shard(shard.location, {"txt"})
    while some := list(islice(samples, batch)):
        captions = [(key, members["txt"]) for key, members in some if "txt" in members]
        without[0] += len(some) - len(captions)
        yield _Part(
            [key for key, _ in captions],
            [caption_digest(key, caption) for key, caption in captions],
            [caption.decode("utf-8", "replace") for _, caption in captions],
            [good.get(key) for key, _ in captions],
        )


def _tokenize(parts: Iterable[_Part], encoder: TextEncoder) -> Iterator[_Part]:
    for part in parts:
        if fresh := part.fresh:
            part.ids = torch.from_numpy(encoder.token_ids(fresh))
        yield part


def _encode(parts: Iterable[_Part], encoder: TextEncoder) -> Iterator[_Part]:
    # All captions are padded to the full length: IF is given the states at the padding too, and they cost the same.
    for part in parts:
        if part.ids is not None:
            part.fetch = encoder.begin(part.ids)
        yield part


def _finite_states(part: _Part, encoder: TextEncoder) -> np.ndarray:
    """[N, tokens, dim] float32 of those that are not kept. Raises: ValueError if they are not finite."""
    if part.fetch is None:
        return np.empty(0)
    states = part.fetch()
    encoder.check_finite(states, part.fresh)
    return states.float().numpy()


def _packed(states: np.ndarray, dtype: str, caption: str) -> np.ndarray:
    try:
        return encode_states(states, dtype)
    except ValueError as error:
        raise ValueError(f"the caption {caption[:80]!r} has {error}: use dtype=bfloat16 or float32") from None


def check_sidecar(shard: Shard, folder: str, meta: TextMeta) -> Found:
    """Compare a sidecar with the captions of its shard, and read all of it.

    Raises: OSError if the shard itself cannot be read.
    """
    found, where = Found(shard), sidecar(shard, folder)
    expected = {
        key: caption_digest(key, members["txt"])
        for key, members in read_shard(shard.location, {"txt"})
        if "txt" in members
    }
    found.captions = len(expected)
    seen: list[str] = []
    try:
        digests, checksums = _records(where)
        with open_location(where) as file:
            reader, number = ShardReader(file, {"npy"}, where), 0
            while (sample := reader.sample()) is not None:
                key, span = sample[0], sample[1].get("npy") or Span(where, 0, 0)
                after = file.tell()
                file.seek(span.offset)
                raw = file.read(span.size)
                file.seek(after)
                seen.append(key)
                told = (digests[number], checksums[number]) if number < min(len(digests), len(checksums)) else ("", "")
                _judge(found, key, span, raw, expected.get(key), told, meta)
                number += 1
    except (OSError, Damaged, ValueError) as error:
        found.unreadable = str(error)
    gone = set(expected).difference(seen)
    found.missing = [key for key in expected if key in gone]
    common = [key for key in seen if key in expected]
    found.order = common == [key for key in expected if key not in gone]
    return found


def _judge(
    found: Found, key: str, span: Span, raw: bytes, caption: str | None, told: tuple[str, str], meta: TextMeta
) -> None:
    """Note an embedding.  caption: the hash of key and caption as they are.  told: what it was, and the checksum."""
    if caption is None:
        found.extra.append(key)
        return
    try:
        if told[1] != f"{zlib.crc32(raw):08x}":
            raise ValueError("another checksum than when it was written")
        from_bytes(raw, meta)
    except ValueError:
        found.damaged.append(key)
    else:
        if told[0] == caption:
            found.good[key] = span
        else:
            found.stale.append(key)


def _records(where: str) -> tuple[list[str], list[str]]:
    """Hashes of captions and checksums of a sidecar, as its stats file has them. Raises: ValueError, OSError."""
    stats = where.removesuffix(".tar") + STATS
    try:
        told = json.loads(read_bytes(stats))
        captions, checksums = told[CAPTIONS], told[CHECKSUMS]
        return [captions[i : i + 16] for i in range(0, len(captions), 16)], [
            checksums[i : i + 8] for i in range(0, len(checksums), 8)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{stats}' is not of this version of data.embed ({error!r})") from None


def extra_sidecars(shards: list[Shard], folder: str) -> list[str]:
    """The sidecars of a folder that belong to none of the shards; none where the folder can't be listed."""
    if is_remote(folder) and not folder.startswith("s3://"):
        return []
    names = {shard.name for shard in shards}
    return [join(folder, name) for name in sorted(list_names(folder)) if name.endswith(".tar") and name not in names]
