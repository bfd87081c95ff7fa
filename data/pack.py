"""Turn pictures and captions into shards: `python -m data.pack source=FOLDER_OR_TABLE out=DIR`."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.cli import arguments, parse
from data.prepare.packing import Picture, Unusable, check_shard_size, claim_folder, pack_rows

SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_COLUMNS = ("path", "image", "file", "url")
CAPTION_COLUMNS = ("caption", "text")


@dataclass
class PackArgs:
    """Pack a folder (pictures, each with a .txt of the same name) or a .csv/.parquet of paths and captions."""

    source: str
    out: str
    shard_size: int = 1000


@dataclass(frozen=True)
class Row:
    """A picture by its path as the source names it; the caption is None where it lies in a .txt beside it."""

    name: str
    caption: str | None = None

    def __str__(self) -> str:
        return self.name


def list_folder(folder: Path) -> list[Row]:
    """The pictures of a folder and of those below it, in the order of their paths."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        shards = any(folder.glob("*.tar"))
        hint = "; it holds shards already, which need no packing" if shards else ""
        raise SystemExit(f"no {', '.join(SUFFIXES)} in {folder} or below{hint}")
    return [Row(path) for path in paths]


def list_table(table: Path) -> list[Row]:
    """The rows of a .csv or .parquet in their order; a missing value becomes an empty one."""
    columns = _csv_columns(table) if table.suffix.lower() == ".csv" else _parquet_columns(table)
    names, captions = _pick(columns, IMAGE_COLUMNS, table), _pick(columns, CAPTION_COLUMNS, table)
    if not names:
        raise SystemExit(f"{table} has no rows")
    return [Row(_text(name), _text(caption)) for name, caption in zip(names, captions, strict=True)]


def read_row(root: Path, row: Row) -> Picture:
    """The picture's bytes and its caption.

    Raises: Unusable.
    """
    name = row.name.removeprefix("file://")
    if not name:
        raise Unusable("no path")
    if "://" in name:
        raise Unusable("a web address (download it first, with img2dataset)")
    path = root / name
    caption = _caption_beside(path) if row.caption is None else row.caption.strip()
    if not caption:
        raise Unusable("empty caption")
    try:
        return Picture(path.read_bytes(), caption, row.name)
    except OSError as error:
        raise Unusable(f"can't be read ({error.strerror})") from None


def main(argv: list[str] | None = None) -> None:
    args = parse(PackArgs, arguments(argv))
    check_shard_size(args.shard_size)
    source, out = Path(args.source), Path(args.out)
    if source.is_dir():
        root, rows = source, list_folder(source)
    elif source.suffix.lower() in (".csv", ".parquet") and source.is_file():
        root, rows = source.parent, list_table(source)
    else:
        raise SystemExit(f"source={source} is neither a folder nor a .csv or .parquet file that exists")
    claim_folder(out, "pack.json", {"rows": len(rows), "listing": _digest(rows), "shard_size": args.shard_size})
    pack_rows(rows, lambda row: read_row(root, row), out, args.shard_size)


def _csv_columns(table: Path) -> dict[str, Sequence[object]]:
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{table} is not a readable UTF-8 CSV: {error}") from None
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _parquet_columns(table: Path) -> dict[str, Sequence[object]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(table)
        wanted = [name for name in file.schema_arrow.names if name.lower() in IMAGE_COLUMNS + CAPTION_COLUMNS]
        values = file.read(columns=wanted)
        # A column that isn't wanted still stands in the message that names what there is.
        return {name: values[name].to_pylist() if name in wanted else () for name in file.schema_arrow.names}
    except ArrowException as error:
        raise SystemExit(f"{table} is not a readable parquet file: {error}") from None


def _pick(columns: dict[str, Sequence[object]], wanted: tuple[str, ...], table: Path) -> Sequence[object]:
    """The first column there is of the wanted names, in any case (LAION writes URL and TEXT)."""
    there = {name.lower(): name for name in columns}
    for name in wanted:
        if name in there:
            return columns[there[name]]
    raise SystemExit(f"{table} has no column {' or '.join(wanted)}; its columns: {', '.join(columns) or 'none'}")


def _text(value: object) -> str:
    # NaN is what pandas leaves for a missing string.
    return "" if value is None or value != value else str(value)


def _caption_beside(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise Unusable("no .txt beside it") from None
    except UnicodeDecodeError:
        raise Unusable("caption is not UTF-8") from None
    except OSError as error:
        raise Unusable(f"caption can't be read ({error.strerror})") from None


def _digest(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.name, row.caption)).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
