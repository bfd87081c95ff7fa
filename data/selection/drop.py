"""Lists of samples to leave out: the keys, URLs or hashes in a .parquet, .csv or .txt."""

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.checks import one_line
from data.storage.locations import open_location, read_bytes, split

if TYPE_CHECKING:
    import pyarrow as pa

# The columns that decide, the first of them that a list has; in any case (LAION writes URL). A URL or a hash names a
# picture in every download, a key in one alone.
COLUMNS = ("url", "sha256", "sha512", "md5", "hash", "phash", "key")
# A list with this column names duplicates: the first row of each group is kept.
GROUP = "group"
HEX = {32: "md5", 64: "sha256", 128: "sha512"}
# Hashes in hexadecimal, which some tools write in capitals.
ANY_CASE = ("md5", "sha256", "sha512", "phash")


@dataclass(slots=True)
class DropList:
    """The values of a list.

    name: of its file.  field: which of COLUMNS.  hashes: _comparable of the values, sorted, uint64 [n].
    """

    name: str
    field: str
    hashes: np.ndarray

    def hits(self, values: "pa.Array | pa.ChunkedArray") -> np.ndarray:
        """Which values of the field are in the list: bool [n]."""
        if not len(self.hashes):
            return np.zeros(len(values), bool)
        hashes = _comparable(self.field, values)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return self.hashes[at] == hashes


def read_list(location: str) -> DropList:
    """Read a list.  Raises: ValueError if it has none of COLUMNS, or can't be read; OSError."""
    import pyarrow as pa

    name = split(location)[1]
    try:
        if name.endswith(".parquet"):
            field, values = _from_parquet(location)
        elif name.endswith(".csv"):
            field, values = _from_csv(location)
        elif name.endswith(".txt"):
            field, values = _from_text(location)
        else:
            raise ValueError(f"drop={location} must end in .parquet, .csv or .txt")
        return DropList(name, field, np.unique(_comparable(field, values.drop_null())))
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) or type(error).__module__.startswith("data."):  # the storage fails
            raise
        raise ValueError(f"the list '{location}' can't be read: {one_line(str(error))}") from None


def row_hashes(values: "pa.Array | pa.ChunkedArray", person: bytes = b"") -> np.ndarray:
    """A hash of 64 bits of each value, as text; of a missing one that of an empty text: uint64 [n].

    person: makes other hashes for another purpose.
    """
    import pyarrow as pa

    texts = values.cast(pa.string()).cast(pa.binary()).to_pylist()
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(text or b"", digest_size=8, person=person).digest() for text in texts])
    return np.frombuffer(joined, "<u8")


def _comparable(field: str, values: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """The row_hashes of values of a field, the same for a hash in capitals."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = values.cast(pa.string())
    return row_hashes(pc.utf8_lower(texts) if field in ANY_CASE else texts)


def _from_parquet(location: str) -> tuple[str, Any]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with open_location(location) as file:
        parquet = ParquetFile(file)
        schema = parquet.schema_arrow
        columns, field = _pick(location, schema.names)
        for column in columns:
            if pa.types.is_nested(schema.field(column).type):
                held = one_line(str(schema.field(column).type), 100)
                raise ValueError(f"the column {column} of the list '{location}' holds {held}: give one value a row")
        return field, _without_first(parquet.read(columns=columns, use_threads=False), columns)


def _from_csv(location: str) -> tuple[str, Any]:
    import pyarrow as pa
    from pyarrow import csv

    with open_location(location) as file:
        first = file.readline(1 << 20)
        file.seek(0)
        names = csv.read_csv(pa.BufferReader(first), csv.ReadOptions(use_threads=False)).column_names
        columns, field = _pick(location, names)
        # As texts: a key such as 000012345 is no number.
        convert = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        return field, _without_first(csv.read_csv(file, csv.ReadOptions(use_threads=False), None, convert), columns)


def _from_text(location: str) -> tuple[str, Any]:
    import pyarrow as pa

    lines = [line.strip() for line in read_bytes(location).decode("utf-8-sig", "replace").splitlines()]
    lines = [line for line in lines if line]
    fields = {_field_of(line) for line in lines}
    if len(fields) > 1:
        raise ValueError(
            f"the list '{location}' has lines of several kinds ({', '.join(sorted(fields))}): give each its own list, "
            "or a .csv with a header"
        )
    return (fields.pop() if fields else "key"), pa.chunked_array([pa.array(lines, pa.string())])


def _field_of(line: str) -> str:
    if "://" in line:
        return "url"
    return HEX.get(len(line), "key") if re.fullmatch("[0-9a-fA-F]+", line) else "key"


def _pick(location: str, names: list[str]) -> tuple[list[str], str]:
    """The columns to read, that of the groups last, and the field that the first is compared with."""
    by_lower = {name.lower(): name for name in reversed(names)}
    for field in COLUMNS:
        if field in by_lower:
            columns = [by_lower[name] for name in (field, GROUP) if name in by_lower]
            if twice := [name for name in columns if names.count(name) > 1]:
                raise ValueError(f"the list '{location}' has several columns {twice[0]}: rename all but one")
            return columns, field
    listed = one_line(", ".join(names), 300) or "none"
    raise ValueError(f"the list '{location}' has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}: it has {listed}")


def _without_first(table: "pa.Table", columns: list[str]) -> Any:
    """The values, without the first of each group if there are groups. A row without a group is none's duplicate."""
    import pyarrow as pa

    values = table[columns[0]]
    if len(columns) == 1:
        return values
    seen: set = set()
    repeated = []
    for group in table[columns[1]].to_pylist():
        repeated.append(group in seen)
        if group is not None:
            seen.add(group)
    return values.filter(pa.array(repeated, pa.bool_()))
