"""The rows of shards of mosaicml-streaming (MDS), read by their public format; nothing is unpickled.

A shard is: the number of samples and the offset of each and of the end, little-endian uint32; a description that
index.json repeats; the samples. A sample is the sizes, uint32, of its columns that have no fixed one, then all columns.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.checks import one_line
from data.prepare.columns import Columns
from data.prepare.rows import Row, Unusable, file_version, unusable
from data.progress import each

INDEX = "index.json"
BYTES = ("jpeg", "png", "bytes")
NUMBERS = {"int": "<i8", **{f"{kind}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}}
NUMBERS |= {f"float{bits}": f"float{bits}" for bits in (16, 32, 64)}


def _number(kind: str, data: bytes) -> Any:
    return np.frombuffer(data, kind).item()


DECODE: dict[str, Callable[[bytes], Any]] = {
    "str": lambda data: data.decode("utf-8", "surrogateescape"),
    "json": json.loads,
    "str_int": int,
    "str_float": float,
    "str_decimal": float,
    **{name: partial(_number, kind) for name, kind in NUMBERS.items()},
}


class _Column(NamedTuple):
    """A column.  size: its bytes, None if each sample says."""

    name: str
    encoding: str
    size: int | None


def is_mds(folder: Path) -> bool:
    """Whether a folder has an index of MDS shards."""
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        return bool(shards) and shards[0].get("format") == "mds"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def list_mds(folder: Path, columns: Columns) -> list[Row]:
    """The rows of all shards in the order of the index.

    Raises: ValueError if a shard is compressed, cannot be read or lacks a column; OSError.
    """
    rows: list[Row] = []
    for entry in each(json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"], "listing", "file"):
        try:
            file = folder / Path(entry["raw_data"]["basename"]).name
            names = zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True)
            described, samples = [_Column(*column) for column in names], _size(entry["samples"])
            for column in described:
                if not isinstance(column.name, str) or not isinstance(column.encoding, str):
                    raise TypeError("a column's name or encoding is no text")
                _size(0 if column.size is None else column.size)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{(folder / INDEX).absolute()}' is no index of MDS shards ({error!r})") from None
        if not file.exists() and entry.get("zip_data"):
            raise ValueError(f"'{file.absolute()}' is compressed: write the dataset again with compression=None")
        rows += _rows(file, described, samples, columns)
    return rows


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{one_line(repr(value))} is no size")
    return value


def _rows(file: Path, described: list[_Column], samples: int, columns: Columns) -> list[Row]:
    names = [column.name for column in described]
    with_bytes = [column.name for column in described if column.encoding in BYTES]
    image, caption, more = columns.find(file, names, with_bytes)
    encodings = {column.name: column.encoding for column in described}
    columns.left_out |= dict.fromkeys(column for column in more.values() if encodings[column] not in DECODE)
    more = {entry: column for entry, column in more.items() if encodings[column] in DECODE}
    if image not in with_bytes or encodings[caption] not in DECODE:
        kinds = f"{image} is {encodings[image]}, {caption} is {encodings[caption]}"
        raise ValueError(f"'{file.absolute()}': pictures are taken from {', '.join(BYTES)}, captions from str; {kinds}")
    rows, version = [], file_version(str(file))
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        head = opened.read(4 * (min(samples, size // 4) + 2))
        offsets = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
        if len(offsets) != samples + 2 or offsets[0] != samples or offsets[-1] > size:
            raise ValueError(f"'{file.absolute()}' is cut, or no MDS shard of {samples} samples")
        for i, (begin, end) in enumerate(zip(offsets[1:-1].tolist(), offsets[2:].tolist(), strict=True)):
            name = f"{file.name} row {i}"
            try:
                places = _places(opened, begin, end, described)
                wanted = (caption, *more.values())
                values = {column: _value(opened, *places[column], encodings[column]) for column in wanted}
            except ValueError as error:
                rows.append(Row(name, problem=f"damaged ({one_line(str(error), 60)})"))
                continue
            row = columns.row(file, name, values[caption], {entry: values[column] for entry, column in more.items()})
            row.image, row.version = partial(_read, str(file), *places[image]), version
            rows.append(row)
    return rows


def _places(file: Any, begin: int, end: int, described: list[_Column]) -> dict[str, tuple[int, int]]:
    """Where each column of a sample lies, and its bytes. Raises: ValueError if they do not fill the sample."""
    file.seek(begin)
    own = sum(column.size is None for column in described)
    sizes = iter(np.frombuffer(file.read(4 * own), "<u4").tolist())
    at, places = begin + 4 * own, {}
    for column in described:
        size = next(sizes, 0) if column.size is None else column.size
        places[column.name], at = (at, size), at + size
    if at != end:
        raise ValueError("its columns do not fill it")
    return places


def _value(file: Any, at: int, size: int, encoding: str) -> Any:
    file.seek(at)
    try:
        return DECODE[encoding](file.read(size))
    except RecursionError:
        raise ValueError("nested too deep") from None


def _read(file: str, at: int, size: int) -> bytes:
    try:
        with open(file, "rb") as opened:
            opened.seek(at)
            data = opened.read(size)
    except OSError as error:
        raise unusable(error) from None
    if len(data) != size or not data:
        raise Unusable("no bytes of a picture")
    return data
