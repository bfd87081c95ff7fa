"""The stored form lowrank: a caption's states as small integers, to a chosen error, by low rank and entropy coding.

States are centred and scaled channel by channel (Channels). The tokens of a caption and its padding are a group each,
whose rows [rows, dim] become a product of coefficients [rows, rank] and components [rank, dim], by the singular value
decomposition: neighbours in the padding are alike, so that most of its components are dropped. Both factors are
rounded to integers, the components in steps that give the wanted error, and Huffman-coded by zstd. Integers whose
sums are exact in floating point decode to the same bits on every machine.
Source: reverse water-filling, Cover and Thomas 2006, 10.3.3.
"""

import base64
import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# Coefficients are in units of 2^-UNIT. Of float32 and float64 integers up to these are exact.
UNIT = 10
EXACT = 1 << 24
# A channel that hardly varies is taken to vary by this share of the median channel.
LEAST_SCALE = 1 / 16
# Components are coded together while their root mean square falls by less than this.
ALIKE = 2**0.5
# zstd's level: of noise without repeats the higher ones make nothing smaller.
LEVEL = 1
VERSION = 1
MAX_SHIFT = 16
# Deviations beyond which states are refused before float32 overflows, and how far the error may exceed what is asked.
FARTHEST, ABOVE = 1e9, 1.05
# Of a caption: version, hash of the channels, tokens that are no padding.  Of a group: rank, step, bytes of the
# coefficients.  Of components that are coded together: their number, bits below, the largest if several share a byte,
# bytes.
_HEAD, _GROUP, _PART = struct.Struct("<BQH"), struct.Struct("<HfI"), struct.Struct("<HBBI")
DAMAGED, OTHER_CHANNELS = "embedding not readable", "embedding of other channels than meta.json has"


@dataclass(frozen=True)
class Channels:
    """What is known of the channels of an encoder's states: decides how few bytes they take, and their values.

    center: [2, dim] float32, the mean over tokens and over padding.  scale: [dim] float32, the standard deviation.
    """

    center: np.ndarray
    scale: np.ndarray

    def to_text(self) -> str:
        """As it is kept in meta.json: base64 of little-endian float32 [3, dim]."""
        return base64.b64encode(np.vstack([self.center, self.scale]).astype("<f4").tobytes()).decode()


def measure_channels(states: np.ndarray, lengths: np.ndarray) -> Channels:
    """The channels of states [N, tokens, dim] of N captions, of which lengths [N] tokens are no padding.

    Raises: ValueError if there are none, or all is padding.
    """
    if not len(states):
        raise ValueError("there are no captions to measure the encoder's channels on")
    padding = np.arange(states.shape[1]) >= lengths[:, None]
    if padding.all():
        raise ValueError("the captions that the encoder's channels are measured on have no tokens but padding")
    tokens = states[~padding].astype(np.float64)
    mean, std = tokens.mean(0), tokens.std(0)
    least = np.median(std) * LEAST_SCALE
    scale = np.maximum(std, least if least > 0 else 1.0)
    center = np.stack([mean, states[padding].astype(np.float64).mean(0) if padding.any() else mean])
    return Channels(center.astype(np.float32), scale.astype(np.float32))


# By the hash that each embedding names them with. A training may read folders that were measured on other captions.
_known: dict[tuple[int, int], Channels] = {}


@lru_cache(maxsize=64)
def register_channels(text: str, dim: int) -> tuple[int, Channels]:
    """Make channels known to decode. Returns the hash that embeddings name them with, and the channels.

    text: as Channels.to_text gives it.
    Raises: ValueError if it is not, its numbers are not finite or its scales not positive.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(3, dim).astype(np.float32)
    except ValueError:
        raise ValueError(f"its channels are not [3, {dim}] float32 in base64") from None
    if not np.isfinite(values).all() or not (values[2] > 0).all():
        raise ValueError("its channels are not finite, or a scale is not positive")
    channels = Channels(values[:2], values[2])
    code = int.from_bytes(hashlib.blake2b(values.astype("<f4").tobytes(), digest_size=8).digest(), "little")
    _known[code, dim] = channels
    return code, channels


def encode(states: np.ndarray, length: int, channels: str, error: float) -> bytes:
    """States [tokens, dim] float32, of which the first `length` are no padding.

    error: root mean square over a group of its error, in standard deviations of each channel.
    Raises: ValueError if the states are too far from what the channels say, or the error is not between 0 and 1.
    """
    if not 0 < error < 1:
        raise ValueError(f"error={error} must lie between 0 and 1")
    code, known = register_channels(channels, states.shape[1])
    data = [_HEAD.pack(VERSION, code, length)]
    for center, rows in zip(known.center, (states[:length], states[length:]), strict=True):
        if len(rows):
            with np.errstate(over="ignore"):  # what is infinite is refused
                scaled = (rows - center) / known.scale
            data.append(_encode_group(scaled, error))
    return b"".join(data)


def _encode_group(rows: np.ndarray, error: float) -> bytes:
    if not np.abs(rows).max() < FARTHEST:
        raise _too_far(rows)
    energy, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
    energy = np.maximum(energy[::-1] / rows.shape[1], 0)
    # Components below the floor are dropped; the others each get the floor as their error.
    floor = _water_level(energy, error**2 * len(rows))
    rank = int((energy > floor).sum())
    if not rank:
        return _GROUP.pack(0, 0.0, 0)
    coefficients, components, step = _round(rows, vectors[:, ::-1][:, :rank], floor)
    if rank < len(rows):
        # Few strong components: what rounding takes from their coefficients is more than the error. All of them fit
        # exactly, however they are rounded.
        off = rows - coefficients.astype(np.float32) @ (components * np.float32(step / (1 << UNIT)))
        if np.square(off, dtype=np.float64).mean() > (ABOVE * error) ** 2:
            rank = len(rows)
            coefficients, components, step = _round(rows, vectors[:, ::-1], error**2)
    packed = _compress(_planes(coefficients.T))
    data = [_GROUP.pack(rank, step, len(packed)), packed]
    size = np.sqrt(np.square(components, dtype=np.float64).mean(1))
    first = 0
    while first < rank:
        alike = size[first:] * ALIKE >= size[first]
        stop = rank if alike.all() else first + int(alike.argmin())
        data.append(_encode_part(components[first:stop]))
        first = stop
    return b"".join(data)


def _round(rows: np.ndarray, vectors: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients [rows, rank] int16, components [rank, dim] int32 and their step, of vectors [rows, rank].

    vectors: orthonormal.  floor: mean square of the error of each component.
    Raises: ValueError if a component is too large.
    """
    step = float(np.float32((12 * floor) ** 0.5))
    coefficients = np.rint(vectors * (1 << UNIT)).astype(np.int16)
    # The components are those that fit best to the coefficients as they are rounded.
    rounded = coefficients.astype(np.float64) / (1 << UNIT)
    solved = np.linalg.solve(rounded.T @ rounded, rounded.T).astype(np.float32)
    components = np.rint(solved @ rows / np.float32(step))
    if not np.abs(components).max() < 127 << MAX_SHIFT:
        raise _too_far(rows)
    return coefficients, components.astype(np.int32), step


def _too_far(rows: np.ndarray) -> ValueError:
    return ValueError(f"states that are {np.abs(rows).max():.3g} times as large as those of other captions")


def _water_level(energy: np.ndarray, total: float) -> float:
    """The floor at which sum(min(energy, floor)) is the total.  energy: in falling order."""
    behind = np.append(np.cumsum(energy[::-1])[::-1][1:], 0.0)  # of the components after each
    for kept in range(len(energy), 0, -1):
        floor = (total - behind[kept - 1]) / kept
        if 0 < floor < energy[kept - 1]:
            return float(floor)
    return float(max(energy[0], total))


def _encode_part(components: np.ndarray) -> bytes:
    """Components [rows, dim] int32 of about one size: a byte for each, and what exceeds it in bits below."""
    most = int(np.abs(components).max())
    shift = max(most.bit_length() - 7, 0)
    high = components >> shift
    per_byte = _values_in_byte(most) if not shift else 1
    if per_byte > 1:
        base = 2 * most + 1
        digits = np.zeros((-(-high.size // per_byte), per_byte), np.int32)
        digits.reshape(-1)[: high.size] = high.ravel() + most
        symbols = (digits * base ** np.arange(per_byte)).sum(1).astype(np.uint8)
    else:
        symbols = high.astype(np.int8).view(np.uint8)
    low = b"".join(np.packbits(components >> bit & 1).tobytes() for bit in range(shift))
    packed = _compress(symbols)
    return _PART.pack(len(components), shift, most if per_byte > 1 else 0, len(packed)) + packed + low


def _values_in_byte(most: int) -> int:
    """How many numbers from -most to most fit into a byte; 1 if they are all 0."""
    base, count = 2 * most + 1, 1
    while base > 1 and base ** (count + 1) <= 256:
        count += 1
    return count


def decode(out: np.ndarray, data: bytes | memoryview) -> None:
    """Write the states that encode stored into out [tokens, dim] float32: the same bits on every machine.

    Raises: ValueError if the data is not of such an array, its channels are not known, or it is not finite.
    """
    reader = _Reader(data)
    version, code, length = reader.unpack(_HEAD)
    if version != VERSION or length > len(out):
        raise ValueError(DAMAGED)
    if (known := _known.get((code, out.shape[1]))) is None:
        raise ValueError(OTHER_CHANNELS)
    for center, rows in zip(known.center, (out[:length], out[length:]), strict=True):
        if len(rows):
            _decode_group(rows, reader, center, known.scale)
    if reader.left or not np.isfinite(out).all():
        raise ValueError(DAMAGED)


def _decode_group(out: np.ndarray, reader: "_Reader", center: np.ndarray, scale: np.ndarray) -> None:
    rank, step, size = reader.unpack(_GROUP)
    if rank > len(out) or not 0 <= step < np.inf:
        raise ValueError(DAMAGED)
    if not rank:
        out[:] = center
        return
    coefficients = _from_planes(reader.decompress(size, 2 * rank * len(out)), (rank, len(out))).T
    components, first = np.empty((rank, out.shape[1]), np.float32), 0
    while first < rank:
        rows, shift, most, size = reader.unpack(_PART)
        if not 0 < rows <= rank - first or shift > MAX_SHIFT or (most and shift) or most > 127:
            raise ValueError(DAMAGED)
        _decode_part(components[first : first + rows], reader, shift, most, size)
        first += rows
    # No sum of whole numbers below this depends on the order in which it is added up, nor on the machine.
    largest = np.abs(coefficients.astype(np.int32)).max(0).astype(np.float64) @ np.abs(components).max(1).astype(
        np.float64
    )
    kind = np.float32 if largest < EXACT else np.float64
    if kind is np.float32:
        np.matmul(coefficients.astype(kind), components, out=out)
    else:
        out[:] = coefficients.astype(kind) @ components.astype(kind)
    with np.errstate(all="ignore"):
        out *= scale * np.float32(step / (1 << UNIT))
        out += center


def _decode_part(out: np.ndarray, reader: "_Reader", shift: int, most: int, size: int) -> None:
    """Write components into out [rows, dim].  most: the largest number if several share a byte, else 0."""
    if most:
        per_byte = _values_in_byte(most)
        symbols = np.frombuffer(reader.decompress(size, -(-out.size // per_byte)), np.uint8)
        out[:] = _digits(most, per_byte)[symbols].reshape(-1)[: out.size].reshape(out.shape)
        return
    out[:] = np.frombuffer(reader.decompress(size, out.size), np.int8).reshape(out.shape)
    if shift:
        out *= 1 << shift
        for bit in range(shift):
            bits = np.unpackbits(np.frombuffer(reader.take(-(-out.size // 8)), np.uint8), count=out.size)
            out += bits.reshape(out.shape).astype(np.float32) * np.float32(1 << bit)


@lru_cache(maxsize=128)
def _digits(most: int, per_byte: int) -> np.ndarray:
    """[256, per_byte] float32: the numbers that share a byte."""
    base = 2 * most + 1
    return (np.arange(256)[:, None] // base ** np.arange(per_byte) % base - most).astype(np.float32)


def _planes(numbers: np.ndarray) -> np.ndarray:
    """int16 as the low bytes of all, then the high bytes, which are mostly alike."""
    return np.ascontiguousarray(numbers.astype("<i2").reshape(-1, 1).view(np.uint8).T)


def _from_planes(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view("<i2").reshape(shape).astype(np.int16)


class _Reader:
    """Takes bytes one after the other. Nothing is allocated that the array's shape does not ask for."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise ValueError(DAMAGED)
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, fields: struct.Struct) -> tuple:
        return fields.unpack(self.take(fields.size))

    def decompress(self, size: int, expected: int) -> bytes:
        try:
            data = _zstd().decompress(self.take(size), expected, asbytes=True)
        except OSError as error:
            raise ValueError(DAMAGED) from error
        if len(data) != expected:
            raise ValueError(DAMAGED)
        return data


def _compress(symbols: np.ndarray) -> bytes:
    return _zstd().compress(np.ascontiguousarray(symbols).tobytes(), asbytes=True)


@lru_cache(maxsize=1)
def _zstd() -> Any:
    # Here, for it takes a while to import and most stored forms do without.
    import pyarrow as pa

    return pa.Codec("zstd", LEVEL)
