"""One text embedding as the bytes of a .npy file: from the encoder's states, and back."""

import io
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.storage.locations import join, read_bytes
from data.storage.tars import Span
from data.text.lowrank import encode
from data.text.lowrank_factors import factors_bytes, read_factors
from data.text.meta import EMPTY, LOWRANK, TextMeta

# Bytes of the header that to_bytes writes for a vector.
NPY_HEADER = 128


def encode_states(states: np.ndarray, dtype: str) -> np.ndarray:
    """States [tokens, dim] float32 in the form in which they are stored.

    bfloat16: its bits as uint16, rounded to nearest.  int8: [tokens, dim + 4], each token's values in steps of 1/127 of
    the largest of them, followed by the four bytes of that step, a little-endian float32.
    Raises: ValueError if the states are too large for the dtype.
    """
    states = np.ascontiguousarray(states, np.float32)
    finite = _is_finite(states)
    if dtype == "int8":
        step = np.maximum(np.abs(states).max(1, keepdims=True) / 127, np.float32(1e-30)).astype("<f4")
        with np.errstate(invalid="ignore"):
            stored = np.concatenate([np.rint(states / step).astype(np.int8), step.view(np.int8)], axis=1)
    elif dtype == "bfloat16":
        bits = states.view(np.uint32)
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        finite = finite and _is_finite(stored)
    else:
        with np.errstate(over="ignore"):
            stored = states.astype(dtype)
        finite = finite and _is_finite(stored)
    if not finite:
        raise ValueError(f"states that reach {np.abs(states).max():.3g} are too large for {dtype}")
    return stored


def _decode_states(out: np.ndarray, stored: np.ndarray) -> None:
    """Write the stored values into out [tokens, dim]. Raises: ValueError if they are not finite."""
    if stored.dtype == np.int8:
        dim = out.shape[1]
        step = np.ascontiguousarray(stored[:, dim:]).view("<f4")
        finite = bool(np.isfinite(step).all())
        out[:] = stored[:, :dim]
        with np.errstate(all="ignore"):
            out *= step
    elif stored.dtype == np.uint16:
        finite = _is_finite(stored)
        bits = out.view(np.uint32)
        bits[:] = stored
        bits <<= 16
    else:
        finite = _is_finite(stored)
        out[:] = stored
    if not finite:
        raise ValueError("embedding not finite")


def store(states: np.ndarray, length: int, meta: TextMeta) -> bytes:
    """The bytes of a .npy file with the states [tokens, dim] float32 of a caption, in the form that the meta names.

    length: how many of the tokens are no padding.
    Raises: ValueError if the states are too large for the form.
    """
    if meta.dtype != LOWRANK:
        return to_bytes(encode_states(states, meta.dtype))
    if not np.isfinite(states).all():
        raise ValueError(f"states that reach {np.abs(states).max():.3g} are too large for {meta.dtype}")
    return to_bytes(np.frombuffer(encode(states, length, meta.channels, meta.error), np.uint8))


def to_bytes(stored: np.ndarray) -> bytes:
    """The bytes of a .npy file with an embedding as encode_states returns it."""
    buffer = io.BytesIO()
    np.save(buffer, stored, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(source: bytes | Span, meta: TextMeta) -> np.ndarray:
    """[tokens, dim] in meta.array_dtype from the bytes of a .npy file. Nothing is unpickled.

    Raises: ValueError if the array has another shape or dtype, or is not finite; OSError.
    """
    if meta.dtype == LOWRANK:
        import torch  # it takes a second to import

        from data.text.lowrank_product import LowrankProduct

        factors = loaded_array(meta)
        used = read_factors(factors, _lowrank_body(source, meta), *meta.shape)
        product = LowrankProduct(np.zeros(meta.shape, np.float32), torch.device("cpu"))  # none of them is dropped
        return product.states(torch.from_numpy(factors[None, :used])).numpy()[0]
    stored = _stored(source.read() if isinstance(source, Span) else source, meta)
    out = np.empty(meta.shape, meta.array_dtype)  # after the check, for it may be large
    _decode_states(out, stored)
    return out


def loaded_array(meta: TextMeta) -> np.ndarray:
    """For an embedding as a loader carries it: [tokens, dim] in meta.array_dtype, or of lowrank its factors.

    Shapes: factors [bytes] uint8, of which each caption takes what it needs.
    """
    if meta.dtype == LOWRANK:
        return np.empty(factors_bytes(*meta.shape), np.uint8)
    return np.empty(meta.shape, meta.array_dtype)


def read_into(out: np.ndarray, source: bytes | Span, meta: TextMeta) -> None:
    """Read an embedding into out, as loaded_array gives it. Floats of a local tar go there without a copy.

    Raises: ValueError, as from_bytes, and OSError; the content of out is then undefined.
    """
    if meta.dtype == LOWRANK:
        read_factors(out, _lowrank_body(source, meta), *meta.shape)
        return
    if isinstance(source, Span):
        expected = _npy_header(*meta.stored)
        header = bytearray(len(expected))
        direct = meta.dtype == meta.array_dtype
        stored = out if direct else _scratch(*meta.stored, threading.get_ident())
        if source.read_into(header, stored) == len(expected) + stored.nbytes and header == expected:
            if not direct:
                _decode_states(out, stored)
            elif not _is_finite(out):
                raise ValueError("embedding not finite")
            return
        source = source.read()
    _decode_states(out, _stored(source, meta))


@lru_cache(maxsize=8)
def _scratch(kind: str, shape: tuple[int, int], thread: int) -> np.ndarray:
    """A buffer for each thread that is used again and again: to allocate one takes longer than the reading."""
    return np.empty(shape, kind)


def _lowrank_body(source: bytes | Span, meta: TextMeta) -> memoryview:
    """What lies behind the header of a .npy of bytes. Raises: ValueError; OSError."""
    if isinstance(source, Span):
        most = 2 * NPY_HEADER + 4 * meta.tokens * (meta.dim + meta.tokens)  # whatever the tar says
        source = source._replace(size=min(source.size, most)).read()
    body = memoryview(source)[NPY_HEADER:]
    if source[:NPY_HEADER] != _npy_header("uint8", (len(body),)):
        raise ValueError("embedding not readable")
    return body


def _stored(data: bytes, meta: TextMeta) -> np.ndarray:
    """The array in the bytes of a .npy file, without a copy. Raises: ValueError."""
    kind, shape = meta.stored
    header = _npy_header(kind, shape)
    if not data.startswith(header):
        return _from_other_header(data, kind, shape)
    try:
        return np.frombuffer(data, kind, shape[0] * shape[1], len(header)).reshape(shape)
    except ValueError as error:
        raise ValueError("embedding not readable") from error


@lru_cache(maxsize=1024)
def _npy_header(kind: str, shape: tuple[int, ...]) -> bytes:
    """The header that to_bytes writes. To parse a header takes longer than all else, to compare it no time."""
    buffer = io.BytesIO()
    fields = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _from_other_header(data: bytes, kind: str, wanted: tuple[int, int]) -> np.ndarray:
    """The embedding in a .npy file that other software wrote. Raises: ValueError, also if `data` is no .npy file."""
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
    # Checked before the data is read, since numpy would allocate as much memory as the header says.
    if shape != wanted or dtype.name != kind:
        raise ValueError("embedding of another shape or dtype")
    try:
        flat = np.frombuffer(data, dtype, wanted[0] * wanted[1], file.tell())
    except ValueError as error:
        raise ValueError("embedding not readable") from error
    return flat.reshape(shape, order="F" if fortran_order else "C").astype(kind, order="C")


def _is_finite(stored: np.ndarray) -> bool:
    """np.isfinite(stored).all(), for float16 at a twentieth of its cost. uint16 holds the bits of bfloat16.

    Viewed as integers, floats of one sign are in order, with infinity and above it the NaNs at the top: the positive
    ones among signed integers, the negative ones among unsigned integers.
    """
    signed, unsigned = f"i{stored.itemsize}", f"u{stored.itemsize}"
    infinity = 0x7F80 if stored.dtype == np.uint16 else int(np.array(np.inf, stored.dtype).view(unsigned))
    negative = 1 << (8 * stored.itemsize - 1)
    return bool(stored.view(signed).max() < infinity and stored.view(unsigned).max() < infinity + negative)


def read_empty(folder: str | Path, meta: TextMeta) -> np.ndarray:
    """The embedding [tokens, dim] of the empty caption, which takes the place of dropped captions.

    Raises: ValueError.
    """
    path = join(folder, EMPTY)
    try:
        return from_bytes(read_bytes(path), meta.exact).astype(meta.array_dtype, copy=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}', the embedding of the empty caption, cannot be used ({error}): run data.embed again"
        ) from None
