"""What decides a stored embedding, and whether a folder of them fits the shards."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from data.storage.caption_fields import TXT
from data.storage.locations import absolute, is_remote, join, list_names, read_bytes, split
from data.storage.shards import INDEX, Shard, current_digest, read_index, read_stats
from data.storage.tars import write_json
from data.text.lowrank import register_channels
from data.text.sidecar_record import WrongSidecar

logger = logging.getLogger(__name__)

META, EMPTY = "meta.json", "empty.npy"
# What may be wrong with a sidecar; and stats files that are read at once.
CUT, OTHER_CAPTIONS, NO_RECORD = "cut", "of other captions", "without a record"
READERS = 16
# The dtypes that the encoder may run in. T5 v1.1 overflows in float16.
COMPUTE = ("float32", "bfloat16")
# By dtype, how an embedding [tokens, dim] lies in its .npy: the type of its numbers, and how many columns it has
# beyond dim.
STORED = {"float16": ("float16", 0), "float32": ("float32", 0), "bfloat16": ("uint16", 0), "int8": ("int8", 4)}
# The form of data/text/lowrank.py, in which each caption takes other bytes: a .npy of uint8 [bytes].
LOWRANK = "lowrank"
DTYPES = (*STORED, LOWRANK)


@dataclass(slots=True)
class TextMeta:
    """Everything that decides a stored embedding, kept as meta.json beside the sidecar shards.

    encoder: where it was, a folder or a name on the hub with its commit. Its hashes decide whether another is the same.
    tokens, dim: an embedding is [tokens, dim].  dtype: as stored.  compute: the dtype that the encoder ran in.
    cleaning: of the captions, by its name in data.text.captions.
    error, channels: of lowrank alone, what data.text.lowrank.encode was given. Folders whose channels differ are used
    together, since each embedding names its own.
    Raises: ValueError if the channels cannot be used.
    """

    encoder: str = field(compare=False)
    weights_sha256: str
    tokenizer_sha256: str
    tokens: int
    dim: int
    dtype: str
    compute: str
    cleaning: str
    error: float = 0.0
    channels: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.channels:
            register_channels(self.channels, self.dim)

    def __reduce__(self) -> tuple:
        # Made anew where it is unpickled, so that its channels are known there too.
        return TextMeta, tuple(getattr(self, one.name) for one in fields(self))

    @property
    def exact(self) -> "TextMeta":
        """That of the same states in float32, as those of the empty caption are stored beside lowrank."""
        return replace(self, dtype="float32", error=0.0, channels="") if self.dtype == LOWRANK else self

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.dim

    @property
    def array_dtype(self) -> str:
        return "float16" if self.dtype == "float16" else "float32"

    @property
    def stored(self) -> tuple[str, tuple[int, int]]:
        kind, extra = STORED[self.dtype]
        return kind, (self.tokens, self.dim + extra)

    @property
    def nbytes(self) -> int:
        """Of an embedding; 0 if that is another for each caption."""
        if self.dtype == LOWRANK:
            return 0
        kind, (rows, columns) = self.stored
        return rows * columns * np.dtype(kind).itemsize

    def write(self, folder: str | Path) -> None:
        """Write meta.json, whole or not at all."""
        write_json(join(folder, META), self.entries())

    def entries(self) -> dict[str, object]:
        """What meta.json holds: of other forms than lowrank nothing that is only lowrank's."""
        only = () if self.dtype == LOWRANK else ("error", "channels")
        return {name: value for name, value in asdict(self).items() if name not in only}

    @staticmethod
    def read(folder: str | Path) -> "TextMeta":
        """The meta of a folder. Raises: ValueError if there is no meta file or it cannot be read."""
        path = join(folder, META)
        try:
            meta = TextMeta(**json.loads(read_bytes(path)))
            if meta.dtype not in DTYPES:
                raise ValueError(f"dtype {meta.dtype} is none of {', '.join(DTYPES)}")
            if meta.dtype == LOWRANK and not meta.channels:
                raise ValueError("dtype lowrank without channels")
            if meta.dtype == LOWRANK and not 0 < meta.error < 1:
                raise ValueError(f"dtype lowrank with error {meta.error}, which must lie between 0 and 1")
            return meta
        except FileNotFoundError:
            raise ValueError(
                f"no text embeddings in '{absolute(folder)}' (no {META}): "
                f"run `python -m data.embed shards=... out={folder}`"
            ) from None
        except OSError as error:
            raise ValueError(f"'{path}', the meta file of the embeddings, cannot be read: {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a meta file of data.embed ({error}): embed the captions anew") from None


def caption_folder(folder: str | Path, caption: str) -> str:
    """Where the sidecars of a caption field lie: txt's beside meta.json, those of others in a folder of that name."""
    return str(folder) if caption == TXT else join(folder, caption)


def sidecar_location(shard: Shard, folder: str | Path) -> str:
    """The location of a shard's sidecar, which has its file name and its keys, with KEY.npy for each caption.

    folder: as caption_folder gives it.
    """
    return join(folder, shard.name)


def check_meta(folder: str | Path, tokens: int, dim: int) -> TextMeta:
    """The meta of a folder, checked to describe embeddings of the shape that the model takes.

    tokens, dim: of the model; 0 for whatever the embeddings have.
    Raises: ValueError that says what does not fit and what to change.
    """
    meta = TextMeta.read(folder)
    if dim and meta.dim != dim:
        raise ValueError(
            f"the text embeddings in '{folder}' are {meta.dim} wide (encoder {meta.encoder}), "
            f"model.encoder_dim is {dim}: set model.encoder_dim={meta.dim} or embed with another encoder"
        )
    if tokens and meta.tokens != tokens:
        raise ValueError(
            f"the text embeddings in '{folder}' have {meta.tokens} tokens, data.tokens is {tokens}: "
            f"set data.tokens={meta.tokens} or embed with tokens={tokens}"
        )
    return meta


def check_sidecars(
    shards: list[Shard], folder: str | Path, tokens: int, dim: int, captions: Sequence[str] = (TXT,)
) -> TextMeta:
    """check_meta, and that every shard has its own sidecars in the folder, and whole, by their stats files or indices.

    tokens, dim: of the model; 0 for whatever the embeddings have.  captions: the fields that are to be embedded.
    Raises: WrongSidecar if embeddings are of other captions than the shards'; ValueError for what else does not fit.
    Each says what to change.
    """
    meta = check_meta(folder, tokens, dim)
    for caption in captions:
        more = "" if caption == TXT else f" caption={caption}"
        repair = f"`python -m data.embed shards={split(shards[0].location)[0]} out={folder}{more}"
        _check_sidecars(shards, caption_folder(folder, caption), caption, repair)
    return meta


def _check_sidecars(shards: list[Shard], folder: str, caption: str, repair: str) -> None:
    """check_sidecars for one caption field, whose sidecars lie in the folder.  repair: the command, not yet closed."""
    index, total, names = _sidecar_index(folder), len(shards), set[str]()
    if not is_remote(folder) and (caption == TXT or os.path.isdir(folder)):
        names = set(list_names(folder))
    present = None if is_remote(folder) and not index else set(index) if is_remote(folder) else names
    missing = [shard.name for shard in shards if present is not None and shard.name not in present]
    if missing:
        raise ValueError(
            f"{len(missing)} of {total} shards have no embeddings in '{folder}' (first: {missing[0]}): "
            f"run {repair}` again, it adds what is missing, or set text.mode=online"
        )
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda shard: _sidecar_fault(shard, folder, index.get(shard.name), caption), shards))
    first = {fault: shard.name for fault, shard in reversed(list(zip(found, shards, strict=True)))}
    if CUT in first:
        raise ValueError(
            f"{found.count(CUT)} of {total} sidecars in '{folder}' were cut or changed since they were written "
            f"(first: {first[CUT]}): run {repair} mode=repair`"
        )
    if OTHER_CAPTIONS in first:
        raise WrongSidecar(
            f"the embeddings in '{folder}' are of other captions than {found.count(OTHER_CAPTIONS)} of {total} shards "
            f"hold (first: {first[OTHER_CAPTIONS]}): name the embeddings of these shards, or, if their captions were "
            f"changed since, run {repair}`, which makes anew what changed"
        )
    if NO_RECORD in first:
        logger.warning(
            "%d of %d sidecars in '%s' do not record their captions (first: %s), so nothing tells whether they are of "
            "these shards; data.embed records them", found.count(NO_RECORD), total, folder, first[NO_RECORD],
        )  # fmt: skip


def _sidecar_fault(shard: Shard, folder: str, entry: Shard | None, caption: str) -> str:
    """What is wrong with the sidecar of a shard, or ''.  entry: the sidecar in the folder's index, if that has it."""
    sidecar = sidecar_location(shard, folder)
    if is_remote(folder):
        digest = current_digest(shard, caption) if entry and entry.digest else None
        return OTHER_CAPTIONS if entry and digest and digest != entry.digest else ""
    size = os.path.getsize(sidecar)
    if entry and entry.size == size and entry.digest and entry.digest == shard.digest_of(caption):
        return ""
    stats = read_stats(sidecar)
    if stats is None or stats.sidecar_size is None:
        return NO_RECORD
    if stats.sidecar_size != size:
        return CUT
    digest = current_digest(shard, caption)
    return OTHER_CAPTIONS if digest and digest != stats.digest else ""


def _sidecar_index(folder: str) -> dict[str, Shard]:
    """The sidecars by name in the index of a folder of embeddings; none if it has no index.

    Raises: ValueError.
    """
    try:
        return {sidecar.name: sidecar for sidecar in read_index(join(folder, INDEX))}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"the text embeddings in '{folder}' cannot be read: {error}") from None
