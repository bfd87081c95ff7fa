"""What decides a stored embedding, and whether a folder of them fits the shards."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.storage.locations import absolute, is_remote, join, list_names, read_bytes, split
from data.storage.shards import INDEX, Shard, read_index
from data.storage.tars import write_json

META, EMPTY = "meta.json", "empty.npy"
# The dtypes that the encoder may run in. T5 v1.1 overflows in float16.
COMPUTE = ("float32", "bfloat16")
# By dtype, how an embedding [tokens, dim] lies in its .npy: the type of its numbers, and how many columns it has
# beyond dim.
STORED = {"float16": ("float16", 0), "float32": ("float32", 0), "bfloat16": ("uint16", 0), "int8": ("int8", 4)}


@dataclass(slots=True)
class TextMeta:
    """Everything that decides a stored embedding, kept as meta.json beside the sidecar shards.

    tokens, dim: an embedding is [tokens, dim].  dtype: as stored.  compute: the dtype that the encoder ran in.
    cleaning: of the captions, by its name in data.text.captions.
    """

    encoder: str
    weights_sha256: str
    tokenizer_sha256: str
    tokens: int
    dim: int
    dtype: str
    compute: str
    cleaning: str

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
        kind, (rows, columns) = self.stored
        return rows * columns * np.dtype(kind).itemsize

    def write(self, folder: Path) -> None:
        """Write meta.json atomically."""
        write_json(folder / META, asdict(self))

    @staticmethod
    def read(folder: str | Path) -> "TextMeta":
        """The meta of a folder. Raises: ValueError if there is no meta file or it cannot be read."""
        path = join(folder, META)
        try:
            meta = TextMeta(**json.loads(read_bytes(path)))
            if meta.dtype not in STORED:
                raise ValueError(f"dtype {meta.dtype} is none of {', '.join(STORED)}")
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


def sidecar_location(shard: Shard, folder: str | Path) -> str:
    """The location of a shard's sidecar, which has its file name and its keys, with KEY.npy for each caption."""
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


def check_sidecars(shards: list[Shard], folder: str | Path, tokens: int, dim: int) -> TextMeta:
    """check_meta, and that every shard has its sidecar in the folder.

    tokens, dim: of the model; 0 for whatever the embeddings have.
    Raises: ValueError that says what does not fit and what to change.
    """
    meta = check_meta(folder, tokens, dim)
    present = _sidecar_names(str(folder))
    missing = [shard.name for shard in shards if present is not None and shard.name not in present]
    if missing:
        source = split(shards[0].location)[0]
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no embeddings in '{folder}' (first: {missing[0]}): "
            f"run `python -m data.embed shards={source} out={folder}` again, it adds what is missing, "
            "or set text.mode=online"
        )
    return meta


def _sidecar_names(folder: str) -> set[str] | None:
    """The names in a folder of embeddings; behind a URL those in its index, or None if it has no index.

    Raises: ValueError.
    """
    try:
        if is_remote(folder):
            return {shard.name for shard in read_index(join(folder, INDEX))}
        return set(list_names(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"the text embeddings in '{folder}' cannot be read: {error}") from None
