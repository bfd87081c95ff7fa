"""Stored text embeddings: what decides them, whether they fit, and how one is read."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.shards import Shard
from data.tars import write_json

META = "meta.json"
EMPTY = "empty.npy"


@dataclass(slots=True)
class TextMeta:
    """Everything that decides a stored embedding; lies as meta.json beside the sidecar shards.

    tokens, dim: an embedding is [tokens, dim].  dtype: as stored.  compute: as the encoder ran.
    """

    encoder: str
    weights_sha256: str
    tokenizer_sha256: str
    tokens: int
    dim: int
    dtype: str
    compute: str
    cleaning: str

    def write(self, folder: Path) -> None:
        """Write meta.json, aside and renamed."""
        write_json(folder / META, asdict(self))

    @staticmethod
    def read(folder: str | Path) -> "TextMeta":
        """Raises: ValueError if there is none or it is not ours."""
        path = Path(folder) / META
        if not path.exists():
            raise ValueError(
                f"no text embeddings in '{folder}' (no {META}): run `python -m data.embed shards=... out={folder}`"
            )
        try:
            return TextMeta(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a meta file of data.embed ({error}): embed the captions anew") from None


def sidecar(shard: Shard, folder: str | Path) -> Path:
    """The embeddings of a shard: same file name, same keys, KEY.npy."""
    return Path(folder) / shard.path.name


def check_sidecars(shards: list[Shard], folder: str | Path, tokens: int, dim: int) -> TextMeta:
    """Make sure that the embeddings of all shards are there and are what the model takes.

    Raises: ValueError that says what does not fit and what to change.
    """
    meta = TextMeta.read(folder)
    if meta.dim != dim:
        raise ValueError(
            f"the text embeddings in '{folder}' are {meta.dim} wide (encoder {meta.encoder}), "
            f"model.encoder_dim is {dim}: set model.encoder_dim={meta.dim} or embed with another encoder"
        )
    if meta.tokens != tokens:
        raise ValueError(
            f"the text embeddings in '{folder}' have {meta.tokens} tokens, data.tokens is {tokens}: "
            f"set data.tokens={meta.tokens} or embed with tokens={tokens}"
        )
    missing = [shard.path.name for shard in shards if not sidecar(shard, folder).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no embeddings in '{folder}' (first: {missing[0]}): "
            f"run `python -m data.embed shards={shards[0].path.parent} out={folder}` again, it adds what is missing"
        )
    return meta


def to_bytes(embedding: np.ndarray) -> bytes:
    """An embedding as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, embedding, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(data: bytes, meta: TextMeta) -> np.ndarray:
    """[tokens, dim] from the bytes of a .npy file; nothing is unpickled.

    Raises: ValueError if it is of another shape or dtype, or not finite.
    """
    try:
        embedding = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError("embedding not readable") from error
    if embedding.shape != (meta.tokens, meta.dim) or embedding.dtype.name != meta.dtype:
        raise ValueError("embedding of another shape or dtype")
    if not np.isfinite(embedding).all():
        raise ValueError("embedding not finite")
    return embedding


def read_empty(folder: str | Path, meta: TextMeta) -> np.ndarray:
    """The embedding of the empty caption, which stands in for dropped ones.

    Raises: ValueError.
    """
    path = Path(folder) / EMPTY
    try:
        return from_bytes(path.read_bytes(), meta)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}', the embedding of the empty caption, cannot be used ({error}): run data.embed again"
        ) from None
