"""The fields of a shard's samples as a table: of img2dataset's parquet beside the tar, else of KEY.json in the tar.

A field is a number, a text, or true or false. Lists, groups and pictures in a column are none. NaN counts as missing.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from data.checks import did_you_mean, one_line
from data.storage.digests import ShardDigest
from data.storage.locations import is_remote, open_location, split
from data.storage.shards import REINDEX, Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, read_shard

if TYPE_CHECKING:  # its import takes a third of a second, and only who reads fields needs it
    import pyarrow as pa

# The field that every sample has: its key in the tar.
KEY = "key"
NUMBER, TEXT, TRUTH = "number", "text", "true or false"
# A longer KEY.json is not parsed: to hold it as values would take many times its size.
LARGEST_JSON = 1 << 24


def read_fields(shard: Shard, names: Collection[str] | None = None, most: int | None = None) -> "pa.Table":
    """The fields of a shard: a row for each sample in the order of the tar, `key` first, null where one is missing.

    The columns are of int64, uint64, double, string, bool, or null where no sample has a value. Where samples have
    values of several kinds, those of the commonest kind are kept. A sample without a row in the parquet, or whose
    KEY.json can't be read, has no fields but its key.
    names: fields to read; those that the shard does not have are left out. None: all.  most: read the first samples.
    Raises: ValueError if the parquet can't be read, or the tar has another number of samples than the shard; OSError.
    """
    wanted = None if names is None else {KEY, *names}
    table = _from_parquet(shard, wanted, most)
    if table is None:
        table = _from_json(shard, wanted, most)
    expected = shard.count if most is None else min(most, shard.count)
    if table.num_rows != expected:
        folder = split(shard.location)[0]
        raise ValueError(
            f"{shard.location} holds {table.num_rows} samples, its index says {shard.count}: {REINDEX.format(folder)}"
        )
    return table


def state_of(shard: Shard) -> str:
    """Sizes and times of the files that the fields of a local shard are read from; '' behind a URL."""
    if is_remote(shard.location):
        return ""
    found = []
    for location in (shard.location, _parquet_beside(shard)):
        try:
            stat = os.stat(location)
        except FileNotFoundError:
            continue
        found.append(f"{split(location)[1]} {stat.st_size} {stat.st_mtime_ns}")
    return ", ".join(found)


def kind_of(type_: "pa.DataType") -> str:
    """What the values of a column are: NUMBER, TEXT or TRUTH; '' if there are none."""
    import pyarrow as pa

    if pa.types.is_null(type_):
        return ""
    return TRUTH if pa.types.is_boolean(type_) else TEXT if pa.types.is_string(type_) else NUMBER


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The words for a field that the samples do not have, with the one that was meant and all that there are."""
    known = sorted(known)
    by_lower = {field.lower(): field for field in known}
    hint = f" (did you mean '{by_lower[name.lower()]}'?)" if name.lower() in by_lower else did_you_mean(name, known)
    return f"no sample has a field '{one_line(name)}'{hint}; fields: {one_line(', '.join(known), 600)}"


def _from_json(shard: Shard, names: set[str] | None, most: int | None) -> "pa.Table":
    import pyarrow as pa

    keys: list[str] = []
    records: list[dict] = []
    try:
        for key, members in islice(read_shard(shard.location, {"json"}), most):
            keys.append(key)
            records.append(_parse(members.get("json", b"")))
    except DamagedTar:  # what comes before the damage is used, as in a training
        pass
    found = dict.fromkeys(name for record in records for name in record) if names is None else names
    columns = {KEY: pa.array([_utf8(key) for key in keys], pa.string())}
    for name in found:
        if name != KEY and (column := _column([record.get(name) for record in records])) is not None:
            columns[_utf8(name)] = column
    return pa.table(columns)


def _parse(text: bytes) -> dict:
    """The values of a KEY.json; none if it is no JSON object."""
    try:
        record = json.loads(text) if len(text) <= LARGEST_JSON else None
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _column(values: list[Any]) -> "pa.Array | None":
    """The values as a column; None if none of them could be one of a field."""
    import pyarrow as pa

    kinds = Counter(_KIND.get(type(value), "") for value in values if value is not None)
    if not kinds:
        return pa.nulls(len(values))
    kinds.pop("", None)
    if not kinds:
        return None
    kind = max(sorted(kinds), key=lambda kind: kinds[kind])
    kept = [value if _KIND.get(type(value)) == kind else None for value in values]
    if kind == TEXT:
        return pa.array([None if value is None else _utf8(value) for value in kept], pa.string())
    if kind == TRUTH:
        return pa.array(kept, pa.bool_())
    whole = [value for value in kept if type(value) is int]
    if len(whole) == len(kept) - kept.count(None):
        if all(abs(value) < 2**63 for value in whole):
            return pa.array(kept, pa.int64())
        if all(0 <= value < 2**64 for value in whole):  # such as a hash of 64 bits
            return pa.array(kept, pa.uint64())
    return _without_nan(pa.array([None if value is None else _float(value) for value in kept], pa.float64()))


_KIND = {int: NUMBER, float: NUMBER, str: TEXT, bool: TRUTH}


def _utf8(text: str) -> str:
    """A text that Arrow can hold: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _without_nan(column: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)


def _parquet_beside(shard: Shard) -> str:
    return shard.location.removesuffix(".tar") + ".parquet"


def _from_parquet(shard: Shard, names: set[str] | None, most: int | None) -> "pa.Table | None":
    """The fields of the parquet beside the tar, without the rows of failed downloads; None if there is no such file."""
    import pyarrow as pa

    location = _parquet_beside(shard)
    try:
        rows = _successes(location, names)
        if rows is None:
            return None
        if not _in_order(shard, rows):
            keys = _tar_keys(shard, most)
            row_of = {key: i for i, key in reversed(list(enumerate(rows[KEY].to_pylist())))}
            found = [row_of.get(key) for key in keys]
            if keys and not any(row is not None for row in found):
                raise ValueError(f"'{location}' has none of the keys of the tar beside it: move it away, or correct it")
            rows = rows.take(pa.array(found, pa.int64()))
            rows = rows.set_column(0, KEY, pa.array([_utf8(key) for key in keys], pa.string()))
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) or type(error).__module__.startswith("data."):  # the storage fails
            raise
        raise ValueError(f"'{location}' is not a readable parquet file: {one_line(str(error))}") from None
    kept = [KEY, *(name for name in rows.column_names if name != KEY and (names is None or name in names))]
    rows = rows.select(kept).slice(0, most)
    empty = [name for name in kept if rows[name].null_count == rows.num_rows and name != KEY]
    return pa.table({name: pa.nulls(rows.num_rows) if name in empty else rows[name] for name in kept})


def _successes(location: str, names: set[str] | None) -> "pa.Table | None":
    """The rows of the samples that were downloaded; `key` first, then the wanted columns, `status` and `caption`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow.parquet import ParquetFile

    try:
        file = open_location(location)
    except FileNotFoundError:
        return None
    with file:
        parquet = ParquetFile(file)
        schema = parquet.schema_arrow
        if KEY not in schema.names:
            raise ValueError(f"'{location}' has no column '{KEY}', by which its rows belong to samples of the tar")
        wanted = dict.fromkeys([KEY, *(n for n in schema.names if names is None or n in {*names, "status", "caption"})])
        readable = [n for n in wanted if schema.names.count(n) == 1 and _target(schema.field(n).type) is not None]
        table = parquet.read(columns=readable, use_threads=False)
    columns = {name: _plain(table[name].combine_chunks()) for name in readable}
    columns[KEY] = columns[KEY].cast(pa.string())
    rows = pa.table(columns)
    if "status" in columns and kind_of(columns["status"].type) == TEXT:
        rows = rows.filter(pc.equal(rows["status"], "success"))
    return rows.combine_chunks()


def _target(type_: "pa.DataType") -> "pa.DataType | None":
    """The type that a column of a parquet is read as; None if it is not a field."""
    import pyarrow as pa
    import pyarrow.types as is_

    if is_.is_dictionary(type_):
        return _target(type_.value_type)
    if is_.is_integer(type_):
        return type_ if type_ == pa.uint64() else pa.int64()
    if is_.is_floating(type_) or is_.is_decimal(type_):
        return pa.float64()
    if is_.is_string(type_) or is_.is_large_string(type_) or is_.is_string_view(type_):
        return pa.string()
    return type_ if is_.is_boolean(type_) or is_.is_null(type_) else None


def _plain(column: "pa.Array") -> "pa.Array":
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(_target(column.type), safe=False)
    return _without_nan(column) if column.type == pa.float64() else column


def _in_order(shard: Shard, rows: "pa.Table") -> bool:
    """Whether the rows are the samples of the tar in its order, told by the digest of its keys and captions.

    Then the tar need not be read. img2dataset writes an empty caption where there is none.
    """
    if not shard.digest or "caption" not in rows.column_names or rows.num_rows != shard.count:
        return False
    digest = ShardDigest()
    for key, caption in zip(rows[KEY].to_pylist(), rows["caption"].to_pylist(), strict=True):
        digest.add(key or "", str(caption or "").encode())
    return digest.hexdigest() == shard.digest


def _tar_keys(shard: Shard, most: int | None) -> list[str]:
    """The keys of the samples, from the headers."""
    keys: list[str] = []
    try:
        with open_location(shard.location) as file:
            reader = ShardReader(file, set())
            while (most is None or len(keys) < most) and (sample := reader.sample(read=False)):
                keys.append(sample[0])
    except DamagedTar:
        pass
    return keys
