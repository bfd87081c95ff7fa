"""The rows of a table of pictures and captions: .csv, .jsonl or .parquet."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.config import ImageRules
from data.prepare.arrow_tables import list_parquet
from data.prepare.columns import Columns
from data.prepare.rows import Row

# Stands for a NUL, at which Python's csv would stop. It cannot come from a byte of the file.
NUL = "\udc00"


# A number of a CSV as JSON writes it; a column of nothing else holds numbers. Leading zeros belong to names.
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")


def list_table(table: Path, rules: ImageRules, columns: Columns) -> list[Row]:
    """The rows of a table in their order. Paths are taken from the table's folder.

    Raises: ValueError if the table cannot be read, lacks a column or has no rows; OSError.
    """
    reader: dict[str, Callable[[], list[Row]]] = {
        ".csv": lambda: _csv_rows(table, columns),
        ".jsonl": lambda: _json_rows(table, columns),
        ".parquet": lambda: list_parquet([table], None, rules, columns),
    }
    if not (rows := reader[table.suffix.lower()]()):
        raise ValueError(f"'{table.absolute()}' has no rows")
    return rows


def _csv_rows(table: Path, columns: Columns) -> list[Row]:
    rows = _csv_fields(table)
    _, header, problem = next(rows, (0, [], ""))
    if problem:
        raise ValueError(f"the first line of '{table.absolute()}' is {problem}")
    header = [name.strip() for name in header]
    names = columns.find(table, header)
    image, caption = header.index(names.image), header.index(names.caption)
    read = list(rows)
    whole = [fields for _, fields, problem in read if not problem and len(fields) == len(header)]
    more = {name: _Cells(header.index(column), whole) for name, column in names.more.items()}
    found = []
    for line, fields, problem in read:
        if not problem and len(fields) != len(header):
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            problem = f"row has {count}, the header {len(header)}: quote captions that hold commas"
        if not problem and any(NUL in field for field in fields):
            problem = "row holds a NUL"
        name = fields[image] if image < len(fields) else ""
        name = name.replace(NUL, "\0") or (f"line {line + 1}" if problem else "")
        values = {} if problem else {entry: cells.value(fields) for entry, cells in more.items()}
        found.append(columns.row(table, name, "" if problem else fields[caption], values, problem))
    return found


class _Cells:
    """The cells of a column of a CSV: numbers if all that are not empty are written as one, else texts."""

    def __init__(self, place: int, rows: list[list[str]]) -> None:
        self._place = place
        self._numbers = all(NUMBER.fullmatch(fields[place].strip()) or not fields[place].strip() for fields in rows)

    def value(self, fields: list[str]) -> str | float | int | None:
        """The value in a row; None for an empty one among numbers."""
        cell = fields[self._place]
        if not self._numbers:
            return cell
        return json.loads(cell.strip()) if cell.strip() else None


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


def _json_rows(table: Path, columns: Columns) -> list[Row]:
    """The rows of JSON lines, as in the metadata.jsonl of Hugging Face's ImageFolder."""
    values: list[Any] = []
    with open(table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in filter(str.strip, file):
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                values.append(None)
    names = list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))
    image, caption, more = columns.find(table, names)
    return [
        columns.row(
            table, value.get(image), value.get(caption),
            {entry: value[column] for entry, column in more.items() if column in value},
        )
        if isinstance(value, dict)
        else Row(f"row {i}", problem="not a JSON object")
        for i, value in enumerate(values)
    ]  # fmt: skip
