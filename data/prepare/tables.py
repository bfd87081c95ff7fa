"""The rows of a table of pictures and captions: .csv, .jsonl, or .parquet, also with the pictures' bytes in it."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.checks import did_you_mean, one_line
from data.config import ImageRules
from data.prepare.rows import Row, Unusable, caption_text, file_version, read_image_file

IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "url")
CAPTION_COLUMNS = ("caption", "text")
# Stands for a NUL, at which Python's csv would stop. It cannot come from a byte of the file.
NUL = "\udc00"


def list_table(table: Path, rules: ImageRules, image_column: str = "", caption_column: str = "") -> list[Row]:
    """The rows of a table in their order. Paths are taken from the table's folder.

    image_column, caption_column: the columns; by default the first of IMAGE_COLUMNS and of CAPTION_COLUMNS in it.
    Raises: ValueError if the table cannot be read, lacks a column or has no rows; OSError.
    """
    columns = _Columns(table, image_column, caption_column)
    reader: dict[str, Callable[[], list[Row]]] = {
        ".csv": lambda: _csv_rows(columns),
        ".jsonl": lambda: _json_rows(columns),
        ".parquet": lambda: _parquet_rows(columns, rules),
    }
    if not (rows := reader[table.suffix.lower()]()):
        raise ValueError(f"'{table.absolute()}' has no rows")
    return rows


class _Columns:
    """Which columns of a table to take.  image, caption: their names as a user gave them, or ''."""

    def __init__(self, table: Path, image: str, caption: str) -> None:
        self.table, self.image, self.caption = table, image, caption

    def find(self, names: Sequence[str], with_bytes: Sequence[str] = ()) -> tuple[str, str]:
        """The columns of the pictures and of the captions among the names. with_bytes: those that hold bytes.

        Raises: ValueError.
        """
        embedded = [name for name in with_bytes if name.lower() in IMAGE_COLUMNS]
        return (
            self._pick("image_column", self.image, IMAGE_COLUMNS, names if self.image else embedded or names),
            self._pick("caption_column", self.caption, CAPTION_COLUMNS, names),
        )

    def row(self, name: Any, caption: Any, problem: str = "") -> Row:
        """A row whose picture is a file. A missing value becomes an empty one."""
        try:
            path, text = _text(name, "path"), _text(caption, "caption")
        except Unusable as error:
            return Row(name if isinstance(name, str) else "", problem=str(error))
        file = path.removeprefix("file://")
        return Row(path, file if "://" in file else os.path.join(self.table.parent, file), text, problem=problem)

    def _pick(self, option: str, given: str, wanted: tuple[str, ...], names: Sequence[str]) -> str:
        """The column that was given, else the first wanted one, in any case (LAION writes URL and TEXT)."""
        by_name = {name.lower(): name for name in reversed(names)}
        for name in (given,) if given else wanted:
            if name in names or name.lower() in by_name:
                return name if name in names else by_name[name.lower()]
        what = f"no column '{one_line(given)}'{did_you_mean(given, names)}"
        what = what if given else f"no column {' or '.join(wanted)}"
        listed = one_line(", ".join(names), 300) or "none, it is empty"
        hint = "" if given or not names else f": name one by {option}="
        raise ValueError(f"'{self.table.absolute()}' has {what}; its columns: {listed}{hint}")


def _text(value: Any, what: str) -> str:
    """A cell as text. NaN is what pandas leaves for a missing one. Raises: Unusable for what is no text."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return caption_text(value)
    if isinstance(value, (list, dict)):
        raise Unusable(f"its {what} is a {'list' if isinstance(value, list) else 'group of values'}, not a text")
    return str(value)


def _csv_rows(columns: _Columns) -> list[Row]:
    rows = _csv_fields(columns.table)
    _, header, problem = next(rows, (0, [], ""))
    if problem:
        raise ValueError(f"the first line of '{columns.table.absolute()}' is {problem}")
    header = [name.strip() for name in header]
    image, caption = (header.index(name) for name in columns.find(header))
    found = []
    for line, fields, problem in rows:
        if not problem and len(fields) != len(header):
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            problem = f"row has {count}, the header {len(header)}: quote captions that hold commas"
        if not problem and any(NUL in field for field in fields):
            problem = "row holds a NUL"
        name = fields[image] if image < len(fields) else ""
        name = name.replace(NUL, "\0") or (f"line {line + 1}" if problem else "")
        found.append(columns.row(name, "" if problem else fields[caption], problem))
    return found


def _csv_fields(table: Path) -> Iterator[tuple[int, list[str], str]]:
    """Number of the first line, fields and problem of each row that is not blank.

    After a row that cannot be read, reading goes on at the next line, so that a quote without an end costs one row.
    """
    with open(table, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name. Rows that are not UTF-8 are found by
    # their surrogates.
    try:
        with open(table, newline="", encoding="utf-16" if utf16 else "utf-8-sig", errors="surrogateescape") as text:
            lines = [line.replace("\0", NUL) for line in text]
    except UnicodeDecodeError as error:
        raise ValueError(f"'{table.absolute()}' is not a readable CSV: {error}") from None
    start = 0
    while start < len(lines):
        first = start
        reader = csv.reader((lines[i] for i in range(first, len(lines))), strict=True, skipinitialspace=True)
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield start, fields, ""
                start = first + reader.line_num
        except csv.Error as error:
            yield start, [], f"not a row of a CSV ({error})"
            start += 1


def _json_rows(columns: _Columns) -> list[Row]:
    """The rows of JSON lines, as in the metadata.jsonl of Hugging Face's ImageFolder."""
    values: list[Any] = []
    with open(columns.table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in filter(str.strip, file):
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                values.append(None)
    names = list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))
    image, caption = columns.find(names)
    return [
        columns.row(value.get(image), value.get(caption))
        if isinstance(value, dict)
        else Row(f"row {i}", problem="not a JSON object")
        for i, value in enumerate(values)
    ]


def _parquet_rows(columns: _Columns, rules: ImageRules) -> list[Row]:
    # Imported here: it takes a while, and only a .parquet needs it.
    import pyarrow as pa

    table = columns.table
    try:
        images = _ParquetImages(table, rules)
        image, caption = columns.find(images.columns, images.with_bytes)
        captions = images.values(caption)
        if image not in images.with_bytes:
            return [columns.row(*pair) for pair in zip(images.values(image), captions, strict=True)]
        names = images.names(image)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # a failing disk; what is wrong in the file has no number
            raise
        raise ValueError(f"'{table.absolute()}' is not a readable parquet file: {one_line(str(error))}") from None
    rows = []
    version = file_version(str(table))
    for i, (name, value) in enumerate(zip(names, captions, strict=True)):
        row = columns.row(name or f"row {i}", value)
        row.image, row.version = images.reader(image, i, row.image if name else ""), version
        rows.append(row)
    return rows


class _ParquetImages:
    """The columns of a parquet file, and the pictures in one of them: bytes, or Hugging Face's {bytes, path}.

    One group of rows is in memory at a time.
    """

    def __init__(self, table: Path, rules: ImageRules) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        self._file, self._rules = ParquetFile(table), rules
        schema, leaves = self._file.schema_arrow, self._file.schema
        self.columns: list[str] = schema.names
        self._leaves = {leaves.column(i).path for i in range(len(leaves))}
        self._structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        plain = [
            f.name
            for f in schema
            if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type) or pa.types.is_fixed_size_binary(f.type)
        ]
        self.with_bytes = self._structs + plain
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._groups = [(group, row) for group, count in enumerate(counts) for row in range(count)]
        self._group: tuple[str, int, Any] | None = None

    def values(self, column: str) -> list[Any]:
        """All values of a column."""
        return self._file.read(columns=[column])[column].to_pylist()

    def names(self, column: str) -> list[str | None]:
        """The path beside each picture's bytes, None where there is none."""
        if f"{column}.path" in self._leaves:
            values = self._file.read(columns=[f"{column}.path"])[column].to_pylist()
            return [value and value["path"] for value in values]
        return [None] * len(self._groups)

    def reader(self, column: str, row: int, path: Any) -> Callable[[], bytes]:
        """A function that gives the bytes of a row's picture. path: its file, if the table holds no bytes of it."""

        def read() -> bytes:
            value = self._read(column, row)
            data = value.get("bytes") if isinstance(value, dict) else value
            if data:
                return data
            if not path:
                raise Unusable("no bytes of a picture")
            return read_image_file(path, self._rules)

        return read

    def _read(self, column: str, row: int) -> Any:
        from pyarrow import ArrowException

        number, within = self._groups[row]
        try:
            if self._group is None or self._group[:2] != (column, number):
                self._group = (column, number, self._file.read_row_group(number, columns=[column])[column])
            return self._group[2][within].as_py()
        except (ArrowException, OSError) as error:
            raise Unusable(f"can't be read ({one_line(str(error), 60)})") from None
