"""A selection on disk: which rows of each shard are chosen, and which are held apart; and how many each rule took.

One safetensors file. For each shard two bitmaps, packed by zlib, lie in the tensor `rows`; a training reads a shard's
when it reads the shard. All else, some 60 bytes a shard, is read at the start. A hash covers that, and a hash of its
own (a mark) each bitmap.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data.selection.fields import state_of
from data.storage.locations import is_remote, open_location, size_of, write_whole
from data.storage.shards import Shard

# Tensors of the file beside `rows` and `head`, the hash over them, with their types; a row for each shard.
TENSORS: dict[str, str] = {
    "digests": "u1", "samples": "<u4", "counts": "<u4", "took": "<u4", "missing": "<u4", "sizes": "<u4", "marks": "<u8",
}  # fmt: skip
# safetensors' names of these types.
TYPES = {"u1": "U8", "<u4": "U32", "<u8": "U64"}
LARGEST_HEADER, HEAD_BYTES = 1 << 28, 16
# Columns of counts, sizes and marks.
CHOSEN, HELD = 0, 1


class SelectionChanged(OSError):
    """The selection is not the one that the run began with, or it is damaged."""


@dataclass(slots=True)
class Chosen:
    """What is chosen of one shard.

    bitmaps: packed, of the chosen and of the held rows.  took, missing: for each rule the rows that it took, and those
    of them that a missing field decided (of a list: those that could not be compared, which it did not take).
    state: of the files that were read, before they were (state_of); a finished selection does not hold it.
    """

    samples: int
    counts: tuple[int, int]
    bitmaps: tuple[bytes, bytes]
    marks: tuple[int, int]
    took: list[int]
    missing: list[int]
    state: str = ""

    @staticmethod
    def of(chosen: np.ndarray, held: np.ndarray, took: list[int], missing: list[int]) -> "Chosen":
        """From the masks [samples] of the rows."""
        bits = [np.packbits(mask).tobytes() if mask.any() else b"" for mask in (chosen, held)]
        packed = [zlib.compress(part) if part else b"" for part in bits]
        counts = int(chosen.sum()), int(held.sum())
        return Chosen(len(chosen), counts, (packed[0], packed[1]), (_mark(bits[0]), _mark(bits[1])), took, missing)


class Rule(NamedTuple):
    """A rule in words, how many samples it took, and how many of them a missing field decided (see Chosen)."""

    text: str
    took: int
    missing: int


@dataclass(slots=True)
class Receipt:
    """What the rules took of a dataset, in their order."""

    samples: int
    rules: list[Rule] = field(default_factory=list)
    chosen: int = 0
    held: int = 0

    def lines(self) -> list[str]:
        """A line for each rule, and one for what is left."""
        lines = []
        for text, took, missing in self.rules:
            verb = "holds apart" if text.startswith("validation") else "leaves out"
            unknown = ""
            if missing:
                unknown = f" ({missing:,} of them for a missing field)"
                if text.startswith("drop"):
                    unknown = f" ({missing:,} could not be compared, for they lack the field)"
            lines.append(f"{text} {verb} {took:,}{unknown}")
        share = f" ({self.chosen / self.samples:.1%})" if self.samples else ""
        return [*lines, f"{self.chosen:,} of {self.samples:,} samples are chosen{share}"]

    @staticmethod
    def of_all(texts: Sequence[str], shards: Sequence[Chosen]) -> "Receipt":
        """The sums over shards.  texts: the rules in words."""
        took, missing = (np.sum([getattr(c, name) for c in shards], 0).tolist() for name in ("took", "missing"))
        rules = [Rule(*rule) for rule in zip(texts, took, missing, strict=True)]
        return Receipt(sum(c.samples for c in shards), rules, *np.sum([c.counts for c in shards], 0).tolist())


def write_selection(
    location: str,
    rules: str,
    texts: Sequence[str],
    shards: Sequence[Shard],
    chosen: Sequence[Chosen],
    unfinished: bool = False,
) -> int:
    """Write a selection; it appears whole or not at all. Returns its bytes.

    rules: the digest of Rules.  texts: each of them in words.  unfinished: it is for read_chosen.
    Raises: OSError.
    """
    from safetensors.numpy import save

    n = len(shards)
    arrays = {
        "digests": [list(bytes.fromhex(shard.digest or "")) for shard in shards],
        "samples": [c.samples for c in chosen],
        "counts": [c.counts for c in chosen],
        "took": [c.took for c in chosen],
        "missing": [c.missing for c in chosen],
        "sizes": [[len(bitmap) for bitmap in c.bitmaps] for c in chosen],
        "marks": [c.marks for c in chosen],
    }
    tensors = {name: np.array(value, TENSORS[name]).reshape(n, -1) for name, value in arrays.items()}
    facts = {"rules": rules, "texts": list(texts), "shards": [shard.name for shard in shards]}
    about = json.dumps(facts | ({"states": [c.state for c in chosen]} if unfinished else {}))
    tensors["head"] = np.frombuffer(_head_digest(about, tensors), "u1")
    tensors["rows"] = np.frombuffer(b"".join(b for c in chosen for b in c.bitmaps), "u1")
    # With a second entry of text the order of the two, and so the file, would be another each time.
    data = save(tensors, {"about": about})
    write_whole(location, data)
    return len(data)


def read_chosen(location: str, rules: str, shards: Sequence[Shard]) -> dict[str, Chosen]:
    """What an interrupted run has chosen of these shards by the same rules, by their names.

    Without the shards whose tar or parquet was written again since it was read. Nothing if there is no such file, or
    it is damaged.  Raises: OSError.
    """
    try:
        about, tensors, start = _read_head(location)
        if about["rules"] != rules:
            return {}
        names, states = about["shards"], about["states"]
        with open_location(location) as file:
            file.seek(start)
            rows = file.read()
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
        return {}
    by_name = {shard.name: shard for shard in shards}
    ends, found = np.cumsum(tensors["sizes"].ravel(), dtype=np.int64).reshape(-1, 2).tolist(), {}
    for i, (name, state) in enumerate(zip(names, states, strict=True)):
        shard, samples = by_name.get(name), int(tensors["samples"][i, 0])
        known = tensors["digests"][i].tobytes().hex(), samples, state
        if shard and (shard.digest, shard.count, state_of(shard)) == known:
            lists = [tensors[name][i].tolist() for name in ("counts", "sizes", "marks", "took", "missing")]
            counts, sizes, marks, took, missing = lists
            one, other = (rows[end - size : end] for end, size in zip(ends[i], sizes, strict=True))
            found[name] = Chosen(samples, tuple(counts), (one, other), tuple(marks), took, missing, state)
    return found


@dataclass(slots=True)
class Selection:
    """The chosen rows of the shards of a dataset, in their order.

    counts: [shards, 2], CHOSEN and HELD.  digest: changes with the rows of any shard.
    """

    location: str
    receipt: Receipt
    counts: np.ndarray
    digest: str
    _samples: np.ndarray
    _starts: np.ndarray
    _sizes: np.ndarray
    _marks: np.ndarray

    def is_here(self) -> bool:
        """Whether this machine sees the file; behind a URL it is taken to."""
        return is_remote(self.location) or os.path.isfile(self.location)

    def rows(self, shard: int, column: int) -> np.ndarray:
        """The rows in its tar of a shard's samples, ascending.  column: CHOSEN or HELD.

        Raises: SelectionChanged; OSError.
        """
        size, start = int(self._sizes[shard, column]), int(self._starts[shard, column])
        count, samples = int(self.counts[shard, column]), int(self._samples[shard])
        if not count:
            return np.zeros(0, np.int64)
        with open_location(self.location) as file:
            file.seek(start)
            packed = file.read(size)
        try:
            unpacker = zlib.decompressobj()
            bits = unpacker.decompress(packed, -(-samples // 8))
        except zlib.error:
            bits = b""
        rows: np.ndarray = np.flatnonzero(np.unpackbits(np.frombuffer(bits, "u1"), count=samples))
        if _mark(bits) != int(self._marks[shard, column]) or len(rows) != count:
            raise SelectionChanged(
                f"'{self.location}' is damaged, or was made again since the training began: run the training again"
            )
        return rows


def read_selection(location: str, rules: str, shards: Sequence[Shard], command: str) -> Selection:
    """The selection of the shards by some rules.

    rules: the digest of Rules.  command: that makes the selection, for the errors.
    Raises: ValueError if there is none, or it is of other rules or other shards; OSError.
    """
    try:
        about, tensors, start = _read_head(location)
    except FileNotFoundError:
        raise ValueError(f"there is no '{location}', which says what the rules choose: run `{command}`") from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"'{location}' is no selection, or damaged ({error}): run `{command}`") from None
    if about["rules"] != rules:
        raise ValueError(f"'{location}' is of other rules: run `{command}`")
    place = {name: i for i, name in enumerate(about["shards"])}
    at = np.array([place.get(shard.name, -1) for shard in shards])
    digests, samples = [row.tobytes().hex() for row in tensors["digests"]], tensors["samples"][:, 0]
    changed = [
        shard
        for i, shard in zip(at.tolist(), shards, strict=True)
        if i < 0 or digests[i] != shard.digest or samples[i] != shard.count
    ]
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(shards)} shards changed since '{location}' was made (such as {changed[0].name}), "
            f"or have no index: run `{command}`"
        )
    sizes = tensors["sizes"].astype(np.int64)
    starts = start + np.cumsum(sizes.ravel()).reshape(sizes.shape) - sizes
    counts = tensors["counts"][at].astype(np.int64)
    digest = hashlib.blake2b(tensors["marks"][at].tobytes(), digest_size=16).hexdigest()
    took, missing = (tensors[name][at].sum(0, dtype=np.int64).tolist() for name in ("took", "missing"))
    receipt = Receipt(
        int(samples[at].sum(dtype=np.int64)), [Rule(*rule) for rule in zip(about["texts"], took, missing, strict=True)],
        *counts.sum(0).tolist(),
    )  # fmt: skip
    return Selection(
        location, receipt, counts, digest, samples[at].astype(np.int64), starts[at], sizes[at], tensors["marks"][at]
    )


def _read_head(location: str) -> tuple[dict[str, Any], dict[str, np.ndarray], int]:
    """What a selection says of itself, its tensors beside `rows`, and the byte at which `rows` begins.

    Raises: ValueError, KeyError, TypeError, IndexError if the file is no selection; OSError.
    """
    with open_location(location) as file:
        size = size_of(file)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError("it has no header")
        header = json.loads(file.read(length))
        about, data = json.loads(header["__metadata__"]["about"]), 8 + length
        if not isinstance(about["rules"], str):
            raise ValueError("its rules are no text")
        n, rules = len(about["shards"]), len(about["texts"])
        if not all(isinstance(text, str) for text in (*about["shards"], *about["texts"])):
            raise ValueError("its names are no texts")
        widths = {"digests": 16, "samples": 1, "took": rules, "missing": rules}
        tensors = {}
        for name, type_ in TENSORS.items():
            shape, (begin, end) = (n, widths.get(name, 2)), header[name]["data_offsets"]
            expected = n * shape[1] * np.dtype(type_).itemsize
            if header[name]["dtype"] != TYPES[type_] or end - begin != expected or data + end > size or begin < 0:
                raise ValueError(f"its {name} are of another size")
            file.seek(data + begin)
            tensors[name] = np.frombuffer(file.read(expected), type_).reshape(shape)
        file.seek(data + header["head"]["data_offsets"][0])
        head = file.read(HEAD_BYTES)
    if _head_digest(header["__metadata__"]["about"], tensors) != head:
        raise ValueError("its digest is wrong")
    begin, end = header["rows"]["data_offsets"]
    if end - begin != tensors["sizes"].sum(dtype=np.int64) or data + end != size:
        raise ValueError("it was cut")
    return about, tensors, data + begin


def _head_digest(about: str, tensors: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(about.encode(), digest_size=HEAD_BYTES)
    for name in TENSORS:
        digest.update(tensors[name].tobytes())
    return digest.digest()


def _mark(bits: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(bits, digest_size=8).digest(), "little")
