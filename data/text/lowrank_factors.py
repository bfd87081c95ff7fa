"""From the bytes of a caption of the form lowrank to the factors of its states, which loaders send to the device.

The factors are small integers, which take fewer bytes than the states in float32.
data/text/lowrank_product.py multiplies them.
"""

import struct
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from data.text.lowrank import (
    GROUP,
    HEAD,
    MAX_SHIFT,
    MAX_STEP,
    PART,
    UNIT,
    VERSION,
    is_known,
    values_in_byte,
    zstd,
)

# How many of the bits below a number's byte another byte holds.
LOW_BITS = 7
# Of a caption: hash of the channels, step x 2^-UNIT of tokens and of padding, bytes in all, tokens that are no padding,
# whether it stands for the empty caption.
FACTORS = struct.Struct("<qffiii4x")
DAMAGED, OTHER_CHANNELS = "embedding not readable", "embedding of other channels than meta.json has"


def factors_bytes(tokens: int, dim: int) -> int:
    """Bytes that the factors of a caption take at most."""
    return FACTORS.size + tokens * (1 + -(-MAX_SHIFT // LOW_BITS)) * _row(tokens, dim).itemsize


def empty_factors() -> np.ndarray:
    """What stands for the states of the empty caption, which are stored apart."""
    return np.frombuffer(FACTORS.pack(0, 0.0, 0.0, FACTORS.size, 0, 1), np.uint8)


def used_bytes(factors: np.ndarray) -> int:
    """Bytes of the largest of some captions' factors [N, bytes]; what lies behind is left from others."""
    return max(FACTORS.unpack_from(one)[3] for one in factors)


def read_factors(out: np.ndarray, data: bytes | memoryview, tokens: int, dim: int) -> int:
    """Write the factors of the states that encode stored into out [factors_bytes(tokens, dim)] uint8.

    They are a head (FACTORS), then a row for each component: its coefficients [tokens] float32, which are 0 in the
    other group, and its numbers [dim] int8. A component of larger numbers has more rows, for the bits below. Returns
    how many of the bytes they take.
    Raises: ValueError if the data is not of such states, or its channels are not known.
    """
    reader = _Reader(data)
    version, code, length = reader.unpack(HEAD)
    if version != VERSION or length > tokens:
        raise ValueError(DAMAGED)
    if not is_known(code, dim):
        raise ValueError(OTHER_CHANNELS)
    ends = ((0, length), (length, tokens))
    groups = [_Group.read(reader, end - begin, dim) if end > begin else _Group() for begin, end in ends]
    if reader.left:
        raise ValueError(DAMAGED)
    symbols = _Reader(reader.decompressed())
    size = _row(tokens, dim).itemsize * sum(group.rows for group in groups)
    rows = out[FACTORS.size : FACTORS.size + size].view(_row(tokens, dim))
    rows["coefficients"] = 0
    for group, (begin, end) in zip(groups, ends, strict=True):
        group.write(rows[: group.rows], begin, end, symbols)
        rows = rows[group.rows :]
    steps = (group.step / (1 << UNIT) for group in groups)
    FACTORS.pack_into(out.data, 0, code, *steps, FACTORS.size + size, length, 0)
    return FACTORS.size + size


@dataclass
class _Group:
    """What is read of a group before its numbers are decompressed.

    parts: components, bits below, the largest number if several share a byte, and the planes of the bits below.
    """

    rank: int = 0
    step: float = 0.0
    parts: list[tuple[int, int, int, memoryview]] = field(default_factory=list)

    @staticmethod
    def read(reader: "_Reader", tokens: int, dim: int) -> "_Group":
        rank, step, size = reader.unpack(GROUP)
        if rank > tokens or not 0 <= step < MAX_STEP:
            raise ValueError(DAMAGED)
        group, left = _Group(rank, step), rank
        if not rank:
            return _Group()
        reader.compressed(size, 2 * rank * tokens)
        while left:
            rows, shift, most, size = reader.unpack(PART)
            if not 0 < rows <= left or shift > MAX_SHIFT or (most and shift) or most > 127:
                raise ValueError(DAMAGED)
            reader.compressed(size, -(-rows * dim // values_in_byte(most)) if most else rows * dim)
            group.parts.append((rows, shift, most, reader.take(shift * -(-rows * dim // 8))))
            left -= rows
        return group

    @property
    def rows(self) -> int:
        return sum(rows * (1 + -(-shift // LOW_BITS)) for rows, shift, _, _ in self.parts)

    def write(self, out: np.ndarray, begin: int, end: int, symbols: "_Reader") -> None:
        """Write the rows of the tokens from begin to end.  symbols: what was compressed."""
        if not self.rank:
            return
        shape, dim = (self.rank, end - begin), out["values"].shape[1]
        coefficients = _from_planes(symbols.take(2 * self.rank * (end - begin)), shape)
        for rows, shift, most, planes in self.parts:
            values = {shift: _high(symbols, rows * dim, most)}
            values |= {first: _low(planes, first, shift, rows * dim) for first in range(0, shift, LOW_BITS)}
            for exponent, numbers in values.items():
                out["coefficients"][:rows, begin:end] = coefficients[:rows] * np.float32(1 << exponent)
                out["values"][:rows] = numbers.reshape(rows, dim)
                out = out[rows:]
            coefficients = coefficients[rows:]


def _high(symbols: "_Reader", size: int, most: int) -> np.ndarray:
    """[size] int8: a number in each byte, or several from -most to most."""
    if not most:
        return np.frombuffer(symbols.take(size), np.int8)
    per_byte = values_in_byte(most)
    shared = np.frombuffer(symbols.take(-(-size // per_byte)), np.uint8)
    return _digits(most, per_byte).take(shared, axis=0).reshape(-1)[:size]  # take: ten times as fast as an index


def _low(planes: memoryview, first: int, shift: int, size: int) -> np.ndarray:
    """[size] uint8: of the `shift` bits below, each in a plane of its own, up to LOW_BITS from the first on."""
    bits = np.frombuffer(planes, np.uint8).reshape(shift, -1)[first : first + LOW_BITS]
    numbers = np.unpackbits(bits[0], count=size)
    for place in range(1, len(bits)):
        numbers |= np.unpackbits(bits[place], count=size) << place
    return numbers


@lru_cache(maxsize=128)
def _digits(most: int, per_byte: int) -> np.ndarray:
    """[256, per_byte] int8: the numbers that share a byte."""
    base = 2 * most + 1
    return (np.arange(256)[:, None] // base ** np.arange(per_byte) % base - most).astype(np.int8)


@lru_cache(maxsize=8)
def _row(tokens: int, dim: int) -> np.dtype:
    return np.dtype([("coefficients", "<f4", tokens), ("values", "i1", dim)])


def _from_planes(data: memoryview, shape: tuple[int, int]) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view("<i2").reshape(shape).astype(np.int16)


class _Reader:
    """Takes bytes one after the other. Nothing is allocated that the states' shape does not ask for."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0
        self._compressed, self._expected = list[memoryview](), 0

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

    def compressed(self, size: int, expected: int) -> None:
        """Pass over bytes that zstd makes `expected` bytes of."""
        self._compressed.append(self.take(size))
        self._expected += expected

    def decompressed(self) -> bytes:
        """What was passed over, at once: to start zstd takes as long as 10 KB do."""
        if not self._expected:
            return b""
        try:
            data = zstd().decompress(b"".join(self._compressed), self._expected, asbytes=True)
        except OSError as error:
            raise ValueError(DAMAGED) from error
        if len(data) != self._expected:
            raise ValueError(DAMAGED)
        return data
