"""Tables that pyarrow reads, with the pictures' bytes in them or their paths: .parquet, and Hugging Face's on disk."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.checks import one_line
from data.config import ImageRules
from data.prepare.columns import Columns
from data.prepare.rows import Row, Unusable, file_version, read_image_file, unusable
from data.progress import each

# What save_to_disk of Hugging Face's datasets writes beside the .arrow files of a dataset, and of several splits.
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
# Groups of rows in memory: threads that read ahead are in two at a time.
GROUPS = 2
# What pyarrow raises for a value that Python cannot hold; KeyError is for an unknown time zone.
CONVERSION = (ValueError, OverflowError, KeyError)


def list_parquet(files: Sequence[Path], folder: Path | None, rules: ImageRules, columns: Columns) -> list[Row]:
    """The rows of .parquet files in their order.

    folder: a row without a path is named by its file's path from here, and its number; None: by its number alone.

    Raises: ValueError if a file cannot be read or lacks a column; OSError.
    """
    groups = _Groups()
    return _list(files, folder, lambda file: _Parquet(file, rules, groups), "parquet", columns)


def list_saved(folder: Path, rules: ImageRules, columns: Columns) -> list[Row]:
    """The rows of a dataset that Hugging Face's `save_to_disk` wrote.

    Raises: ValueError if it has several splits, cannot be read or lacks a column; OSError.
    """
    if (folder / SPLITS).exists():
        try:
            splits = [str(name) for name in json.loads((folder / SPLITS).read_text(encoding="utf-8"))["splits"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            splits = []
        listed = one_line(", ".join(splits), 200) or "none that can be read"
        raise ValueError(f"'{folder.absolute()}' holds splits ({listed}): give one, source={folder / 'SPLIT'}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        # The name alone: it lies in this folder.
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        reordered = state.get("_indices_data_files") or state.get("_indices_files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{(folder / STATE).absolute()}' is none of Hugging Face's datasets ({error!r})") from None
    if reordered:
        raise ValueError(f"'{folder.absolute()}' is a reordered dataset: save it again after flatten_indices()")
    groups = _Groups()
    return _list(files, folder, lambda file: _Saved(file, rules, groups), "arrow", columns)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk of Hugging Face's datasets."""
    return (folder / SPLITS).exists() or ((folder / STATE).exists() and (folder / INFO).exists())


def _list(
    files: Sequence[Path], folder: Path | None, open_table: Callable[[Path], "_Table"], form: str, columns: Columns
) -> list[Row]:
    # Imported here: it takes a while, and few sources need it.
    import pyarrow as pa

    rows: list[Row] = []
    for file in each(files, "listing", "file"):
        # Also where there is one file: another one may be added, and the rows of this one keep their names.
        before = f"{file.relative_to(folder)} " if folder else ""
        try:
            rows += _rows(open_table(file), file, before, columns)
        except (pa.ArrowException, OSError, UnicodeError) as error:  # UnicodeError: of a column's name
            if getattr(error, "errno", None):  # a failing disk; what is wrong in the file has no number
                raise
            raise ValueError(f"'{file.absolute()}' is not a readable {form} file: {one_line(str(error))}") from None
    return rows


def _rows(table: "_Table", file: Path, before: str, columns: Columns) -> Iterator[Row]:
    """The rows of a file. before: what comes before the number of a row without a path."""
    image, caption, more = columns.find(file, table.names, table.with_bytes)
    columns.left_out |= dict.fromkeys(column for column in more.values() if column in table.nested)
    more = {entry: column for entry, column in more.items() if column not in table.nested}
    texts = list(dict.fromkeys([caption, *more.values()]))
    version, number = file_version(str(file)), 0
    for group in range(table.groups):
        held = table.read(group, texts)
        values = {name: _values(held[name]) for name in texts}
        paths = table.paths(group, image)
        for i, path in enumerate(paths):
            further = {entry: values[column][i] for entry, column in more.items()}
            row = columns.row(file, path, values[caption][i], further)
            if image in table.with_bytes:
                read = table.reader(image, group, i, row.image if path else "")
                row.name, row.image, row.version = row.name or f"{before}row {number}", read, version
            yield row
            number += 1


def _values(column: Any) -> list[Any]:
    """The values of a column; an Unusable in the place of each that Python cannot hold, such as a date after 9999."""
    try:
        return column.to_pylist()
    except CONVERSION:
        return [_value(value) for value in column]


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unusable("is not UTF-8")
    except CONVERSION:
        return Unusable("can't be read")


class _Groups:
    """The pictures of the groups of rows that were used last, of all tables together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Path, str, int], Any] = OrderedDict()

    def get(self, file: Path, image: str, group: int, read: Callable[[], Any]) -> Any:
        """A column of pictures of a group, which is read if it is not there. One thread reads at a time."""
        key = (file, image, group)
        with self._lock:
            if key not in self._held:
                while len(self._held) >= GROUPS:
                    self._held.popitem(last=False)
                self._held[key] = read()
            self._held.move_to_end(key)
            return self._held[key]


class _Table:
    """The columns of a table whose rows come in groups, and the pictures in one of them: bytes, or {bytes, path}.

    Each row's reader keeps its table, so a table keeps no rows.
    """

    groups: int

    def __init__(self, file: Path, schema: Any, rules: ImageRules, held: _Groups) -> None:
        import pyarrow as pa

        self.names: list[str] = schema.names
        self._structs = [f.name for f in schema if pa.types.is_struct(f.type) and _has_bytes(f.type)]
        self._with_path = [f.name for f in schema if f.name in self._structs and f.type.get_field_index("path") >= 0]
        plain = [f.name for f in schema if _is_bytes(f.type)]
        self.with_bytes = self._structs + plain
        # Never read whole for KEY.json, which would not take them.
        self.nested = {f.name for f in schema if pa.types.is_nested(f.type)} | set(plain)
        self._file, self._rules, self._held = file, rules, held

    def read(self, group: int, columns: list[str]) -> Any:
        """Columns of a group of rows, as a pyarrow.Table. Raises: ArrowException, OSError."""
        raise NotImplementedError

    def paths(self, group: int, image: str) -> list[Any]:
        """The paths of the pictures of a group, None for those that have none beside their bytes."""
        if image not in self.with_bytes:
            return _values(self.read(group, [image])[image])
        if image in self._with_path:
            return self._struct_paths(group, image)
        return [None] * self._count(group)

    def reader(self, image: str, group: int, row: int, path: Any) -> Callable[[], bytes]:
        """A function that gives the bytes of a row's picture. path: its file, if the table holds no bytes of it."""

        def read() -> bytes:
            if data := self._bytes(image, group, row):
                return data
            if not path:
                raise Unusable("no bytes of a picture")
            return read_image_file(path, self._rules)

        return read

    def _count(self, group: int) -> int:
        raise NotImplementedError

    def _struct_paths(self, group: int, image: str) -> list[Any]:
        raise NotImplementedError

    def _bytes(self, image: str, group: int, row: int) -> bytes | None:
        from pyarrow import ArrowException

        try:
            held = self._held.get(self._file, image, group, lambda: self._pictures(group, image))
            return held[row].as_py()
        # IndexError: the file was written anew since it was listed.
        except (ArrowException, OSError, IndexError) as error:
            if isinstance(error, OSError) and error.errno:
                raise unusable(error) from None
            raise Unusable(f"can't be read ({one_line(str(error), 60)})") from None

    def _pictures(self, group: int, image: str) -> Any:
        import pyarrow.compute as pc

        column = self.read(group, [image])[image]
        return pc.struct_field(column, "bytes") if image in self._structs else column


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _has_bytes(struct: Any) -> bool:
    at = struct.get_field_index("bytes")
    return at >= 0 and _is_bytes(struct.field(at).type)


def _as_bytes(kind: Any) -> Any:
    """The type of a column with bytes in the place of texts."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def _paths(structs: Any) -> list[Any]:
    import pyarrow.compute as pc

    return _values(pc.struct_field(structs, "path"))


class _Parquet(_Table):
    """A .parquet. It is open only while it is read: a dataset may have more files than a process may open."""

    def __init__(self, file: Path, rules: ImageRules, held: _Groups) -> None:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as opened:
            self._metadata = opened.metadata
            super().__init__(file, opened.schema_arrow, rules, held)
        self.groups = self._metadata.num_row_groups

    def read(self, group: int, columns: list[str]) -> Any:
        from pyarrow.parquet import ParquetFile

        # Buffers and threads of pyarrow's own would hold the bytes a second time, and for a while after the read.
        with ParquetFile(self._file, metadata=self._metadata, pre_buffer=False) as opened:
            return opened.read_row_group(group, columns=columns, use_threads=False)

    def _count(self, group: int) -> int:
        return self._metadata.row_group(group).num_rows

    def _struct_paths(self, group: int, image: str) -> list[Any]:
        # The path alone is read, not the bytes beside it.
        return _paths(self.read(group, [f"{image}.path"])[image])


class _Saved(_Table):
    """An .arrow file of save_to_disk: a stream of batches, which is mapped and not read into memory."""

    def __init__(self, file: Path, rules: ImageRules, held: _Groups) -> None:
        import pyarrow as pa

        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_stream(mapped)
            self._batches = list(reader)
        super().__init__(file, reader.schema, rules, held)
        self.groups = len(self._batches)

    def read(self, group: int, columns: list[str]) -> Any:
        import pyarrow as pa

        table = pa.Table.from_batches([self._batches[group]]).select(columns)
        # Offsets that lead beyond the file would end the process. A text that is not UTF-8 is its row's fault alone.
        table.cast(pa.schema([(field.name, _as_bytes(field.type)) for field in table.schema])).validate(full=True)
        return table

    def _count(self, group: int) -> int:
        return self._batches[group].num_rows

    def _struct_paths(self, group: int, image: str) -> list[Any]:
        return _paths(self.read(group, [image])[image])
