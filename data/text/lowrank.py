"""The stored form lowrank: a caption's states as small integers, to a chosen error, by low rank and entropy coding.

States are centred and scaled channel by channel (Channels). The tokens of a caption and its padding are a group each,
whose rows [rows, dim] become a product of coefficients [rows, rank] and components [rank, dim], by the singular value
decomposition: neighbours in the padding are alike, so that most of its components are dropped. Both factors are
rounded to integers, the components in steps that give the wanted error, and Huffman-coded by zstd.
data/text/lowrank_factors.py reads the integers, data/text/lowrank_product.py multiplies them.
Source: reverse water-filling, Cover and Thomas 2006, 10.3.3.
"""

import base64
import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# Coefficients are in units of 2^-UNIT.
UNIT = 10
# A channel that hardly varies is taken to vary by this share of the median channel.
LEAST_SCALE = 1 / 16
# Components are coded together while their root mean square falls by less than this.
ALIKE = 2**0.5
# zstd's level: of noise without repeats the higher ones make nothing smaller.
LEVEL = 1
VERSION = 1
# Bits of a number below its byte at most.
MAX_SHIFT = 16
# Steps and channels at least as large are refused: below them states are finite, whatever the bytes say, since a sum is
# below 2^55 units of 2^-UNIT.
MAX_STEP, MAX_CHANNEL = 1024, 1e20
# Deviations beyond which states are refused before float32 overflows, and how far the error may exceed what is asked.
FARTHEST, ABOVE = 1e9, 1.05
# Of a caption: version, hash of the channels, tokens that are no padding.  Of a group: rank, step, bytes of the
# coefficients.  Of components that are coded together: their number, bits below, the largest if several share a byte,
# bytes.
HEAD, GROUP, PART = struct.Struct("<BqH"), struct.Struct("<HfI"), struct.Struct("<HBBI")


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
    """Make channels known to read_factors. Returns the hash that embeddings name them with, and the channels.

    text: as Channels.to_text gives it.
    Raises: ValueError if it is not, its numbers are not finite or too large, or its scales not positive.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(3, dim).astype(np.float32)
    except ValueError:
        raise ValueError(f"its channels are not [3, {dim}] float32 in base64") from None
    if not (np.abs(values) < MAX_CHANNEL).all() or not (values[2] > 0).all():
        raise ValueError(f"its channels are not below {MAX_CHANNEL:g}, or a scale is not positive")
    code = int.from_bytes(
        hashlib.blake2b(values.astype("<f4").tobytes(), digest_size=8).digest(), "little", signed=True
    )
    # + 0: of zeros the positive one, so that the sign of a zero that a centre is added to does not matter.
    channels = Channels(values[:2] + np.float32(0), values[2])
    _known[code, dim] = channels
    return code, channels


def is_known(code: int, dim: int) -> bool:
    """Whether channels of this width were registered, by the hash that embeddings name them with."""
    return (code, dim) in _known


def known_channels(dim: int) -> dict[int, Channels]:
    """All channels of this width that were registered, by the hashes that embeddings name them with, in their order."""
    return dict(sorted((code, channels) for (code, width), channels in _known.items() if width == dim))


def encode(states: np.ndarray, length: int, channels: str, error: float) -> bytes:
    """States [tokens, dim] float32, of which the first `length` are no padding.

    error: root mean square over a group of its error, in standard deviations of each channel.
    Raises: ValueError if the states are too far from what the channels say, or the error is not between 0 and 1.
    """
    if not 0 < error < 1:
        raise ValueError(f"error={error} must lie between 0 and 1")
    code, known = register_channels(channels, states.shape[1])
    data = [HEAD.pack(VERSION, code, length)]
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
        return GROUP.pack(0, 0.0, 0)
    coefficients, components, step = _round(rows, vectors[:, ::-1][:, :rank], floor)
    if rank < len(rows):
        # Few strong components: what rounding takes from their coefficients is more than the error. All of them fit
        # exactly, however they are rounded.
        off = rows - coefficients.astype(np.float32) @ (components * np.float32(step / (1 << UNIT)))
        if np.square(off, dtype=np.float64).mean() > (ABOVE * error) ** 2:
            rank = len(rows)
            coefficients, components, step = _round(rows, vectors[:, ::-1], error**2)
    packed = _compress(_planes(coefficients.T))
    data = [GROUP.pack(rank, step, len(packed)), packed]
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
    per_byte = values_in_byte(most) if not shift else 1
    if per_byte > 1:
        base = 2 * most + 1
        digits = np.zeros((-(-high.size // per_byte), per_byte), np.int32)
        digits.reshape(-1)[: high.size] = high.ravel() + most
        symbols = (digits * base ** np.arange(per_byte)).sum(1).astype(np.uint8)
    else:
        symbols = high.astype(np.int8).view(np.uint8)
    low = b"".join(np.packbits(components >> bit & 1).tobytes() for bit in range(shift))
    packed = _compress(symbols)
    return PART.pack(len(components), shift, most if per_byte > 1 else 0, len(packed)) + packed + low


def values_in_byte(most: int) -> int:
    """How many numbers from -most to most fit into a byte; 1 if they are all 0."""
    base, count = 2 * most + 1, 1
    while base > 1 and base ** (count + 1) <= 256:
        count += 1
    return count


def _planes(numbers: np.ndarray) -> np.ndarray:
    """int16 as the low bytes of all, then the high bytes, which are mostly alike."""
    return np.ascontiguousarray(numbers.astype("<i2").reshape(-1, 1).view(np.uint8).T)


def _compress(symbols: np.ndarray) -> bytes:
    return zstd().compress(np.ascontiguousarray(symbols).tobytes(), asbytes=True)


@lru_cache(maxsize=1)
def zstd() -> Any:
    """The codec."""
    # Here, for it takes a while to import and most stored forms do without.
    import pyarrow as pa

    return pa.Codec("zstd", LEVEL)
