"""Stored text embeddings: what decides them, whether they fit, and how one is read."""

import io
import json
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.shards import INDEX, Shard, read_index
from data.sources import is_remote, join, list_names, read_bytes, split
from data.tars import Span, write_json

META = "meta.json"
EMPTY = "empty.npy"
DTYPES = ("float16", "float32")


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
        path = join(folder, META)
        try:
            return TextMeta(**json.loads(read_bytes(path)))
        except FileNotFoundError:
            raise ValueError(
                f"no text embeddings in '{folder}' (no {META}): run `python -m data.embed shards=... out={folder}`"
            ) from None
        except OSError as error:
            raise ValueError(f"'{path}', the meta file of the embeddings, cannot be read: {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a meta file of data.embed ({error}): embed the captions anew") from None


def sidecar(shard: Shard, folder: str | Path) -> str:
    """Where the embeddings of a shard lie: same file name, same keys, KEY.npy."""
    return join(folder, shard.name)


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
    there = _sidecar_names(str(folder))
    missing = [shard.name for shard in shards if there is not None and shard.name not in there]
    if missing:
        source = split(shards[0].location)[0]
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no embeddings in '{folder}' (first: {missing[0]}): "
            f"run `python -m data.embed shards={source} out={folder}` again, it adds what is missing"
        )
    return meta


def _sidecar_names(folder: str) -> set[str] | None:
    """The names in a folder of embeddings, listed in one go; behind a URL its index says them, if there is one.

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


def to_bytes(embedding: np.ndarray) -> bytes:
    """An embedding as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, embedding, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(data: bytes, meta: TextMeta) -> np.ndarray:
    """[tokens, dim] from the bytes of a .npy file, read-only and without a copy; nothing is unpickled.

    Raises: ValueError if it is of another shape or dtype, or not finite.
    """
    header = _npy_header(meta.tokens, meta.dim, meta.dtype)
    if data.startswith(header):
        try:
            flat = np.frombuffer(data, meta.dtype, meta.tokens * meta.dim, len(header))
        except ValueError as error:
            raise ValueError("embedding not readable") from error
        embedding = flat.reshape(meta.tokens, meta.dim)
    else:
        embedding = _from_other_header(data, meta)
    if not _is_finite(embedding):
        raise ValueError("embedding not finite")
    return embedding


def read_into(out: np.ndarray, source: bytes | Span, meta: TextMeta) -> None:
    """Put an embedding into out [tokens, dim], from a local tar without a copy in between.

    Raises: ValueError, as from_bytes, and OSError; out then holds anything.
    """
    if isinstance(source, Span):
        expected = _npy_header(meta.tokens, meta.dim, meta.dtype)
        header = bytearray(len(expected))
        if source.read_into(header, out) == len(expected) + out.nbytes and header == expected:
            if not _is_finite(out):
                raise ValueError("embedding not finite")
            return
        source = source.read()
    out[:] = from_bytes(source, meta)


@lru_cache
def _npy_header(tokens: int, dim: int, dtype: str) -> bytes:
    """What to_bytes writes before the numbers: to parse it takes longer than all the rest, to compare it no time."""
    if dtype not in DTYPES:
        raise ValueError(f"embedding dtype {dtype} is none of {', '.join(DTYPES)}")
    buffer = io.BytesIO()
    fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens, dim)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _from_other_header(data: bytes, meta: TextMeta) -> np.ndarray:
    """The embedding behind a header that is not to_bytes' own: of other software, or no header at all.

    Raises: ValueError.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran_order, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError("objects are pickled")
    except Exception as error:  # numpy evaluates the header as a literal, which hostile bytes break in many ways
        raise ValueError("embedding not readable") from error
    # Judged before reading, for which numpy would take as much memory as the header says.
    if shape != (meta.tokens, meta.dim) or dtype.name != meta.dtype:
        raise ValueError("embedding of another shape or dtype")
    try:
        flat = np.frombuffer(data, dtype, meta.tokens * meta.dim, file.tell())
    except ValueError as error:
        raise ValueError("embedding not readable") from error
    return flat.reshape(shape, order="F" if fortran_order else "C").astype(meta.dtype, order="C")


def _is_finite(embedding: np.ndarray) -> bool:
    """np.isfinite(embedding).all() at a twentieth of the cost for float16.

    Read as integers, floats of one sign are in order, with the infinity and behind it the NaNs at the top: of the
    positive ones among signed integers, of the negative ones among unsigned.
    """
    infinity = np.array(np.inf, embedding.dtype)
    signed, unsigned = f"i{embedding.itemsize}", f"u{embedding.itemsize}"
    positive_ones = embedding.view(signed).max() < infinity.view(signed)
    return bool(positive_ones and embedding.view(unsigned).max() < (-infinity).view(unsigned))


def read_empty(folder: str | Path, meta: TextMeta) -> np.ndarray:
    """The embedding of the empty caption, which stands in for dropped ones.

    Raises: ValueError.
    """
    path = join(folder, EMPTY)
    try:
        return from_bytes(read_bytes(path), meta)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}', the embedding of the empty caption, cannot be used ({error}): run data.embed again"
        ) from None
