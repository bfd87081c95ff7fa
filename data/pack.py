"""Turn pictures and captions into shards: `python -m data.pack source=FOLDER_OR_TABLE out=DIR`."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.cli import command, location
from data.prepare.packing import Picture, Unusable, check_shard_size, pack_rows, record_recipe
from data.storage.machine import raise_if_machine

SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_COLUMNS = ("path", "image", "file", "url")
CAPTION_COLUMNS = ("caption", "text")


@dataclass
class Pack:
    """Packs pictures and their captions into webdataset shards, the pictures byte for byte.

    A rerun makes only what is missing.

    source: a folder of pictures (.jpg, .jpeg, .png), each with its caption beside it in a .txt of the same name; or a
    .csv or .parquet with a column of paths (path, image, file or url) and one of captions (caption or text). Paths are
    taken from the table's folder.
    out: folder for the shards.
    shard_size: pictures in a shard.
    """

    source: str = location()
    out: str = location()
    shard_size: int = 1000


@dataclass(frozen=True)
class Row:
    """A picture.  name: its path, as the source has it.  caption: None if it is in a .txt beside the picture."""

    name: str
    caption: str | None = None

    def __str__(self) -> str:
        return self.name


def list_folder(folder: Path) -> list[Row]:
    """The pictures of a folder and of the folders below it, in the order of their paths.

    Raises: ValueError if there are none.
    """
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        shards = any(folder.glob("*.tar"))
        hint = "; it holds shards already, which need no packing" if shards else ""
        raise ValueError(f"no {', '.join(SUFFIXES)} in '{folder.absolute()}' or below{hint}")
    return [Row(path) for path in paths]


def list_table(table: Path) -> list[Row]:
    """The rows of a .csv or .parquet in their order; a missing value becomes an empty one.

    Raises: ValueError if the table cannot be read, lacks a column or has no rows.
    """
    columns = _csv_columns(table) if table.suffix.lower() == ".csv" else _parquet_columns(table)
    names, captions = _pick(columns, IMAGE_COLUMNS, table), _pick(columns, CAPTION_COLUMNS, table)
    if not names:
        raise ValueError(f"'{table.absolute()}' has no rows")
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
        raise_if_machine(error, str(path))
        raise Unusable(f"can't be read ({error.strerror})") from None


def pack(args: Pack) -> None:
    """Write the shards that are not there yet.

    Raises: ValueError if an argument cannot be, the source holds nothing usable, or out holds another dataset; OSError.
    """
    check_shard_size(args.shard_size)
    source, out = Path(args.source), Path(args.out)
    if source.is_dir():
        root, rows = source, list_folder(source)
    elif source.suffix.lower() in (".csv", ".parquet") and source.is_file():
        root, rows = source.parent, list_table(source)
    else:
        raise ValueError(f"source='{source.absolute()}' is neither a folder nor a .csv or .parquet file that exists")
    record_recipe(out, "pack.json", {"rows": len(rows), "listing": _digest(rows), "shard_size": args.shard_size})
    pack_rows(rows, lambda row: read_row(root, row), out, args.shard_size)


def main(argv: list[str] | None = None) -> None:
    command(pack, Pack, argv)


def _csv_columns(table: Path) -> dict[str, Sequence[object]]:
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{table.absolute()}' is not a readable UTF-8 CSV: {error}") from None
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _parquet_columns(table: Path) -> dict[str, Sequence[object]]:
    # Imported here: it takes a while, and only a .parquet needs it.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(table)
        wanted = [name for name in file.schema_arrow.names if name.lower() in IMAGE_COLUMNS + CAPTION_COLUMNS]
        values = file.read(columns=wanted)
        # The message about a missing column names all columns, so those that are not read are listed too.
        return {name: values[name].to_pylist() if name in wanted else () for name in file.schema_arrow.names}
    except ArrowException as error:
        raise ValueError(f"'{table.absolute()}' is not a readable parquet file: {error}") from None


def _pick(columns: dict[str, Sequence[object]], wanted: tuple[str, ...], table: Path) -> Sequence[object]:
    """The column of the first wanted name that the table has, in any case (LAION writes URL and TEXT)."""
    names = {name.lower(): name for name in columns}
    for name in wanted:
        if name in names:
            return columns[names[name]]
    raise ValueError(
        f"'{table.absolute()}' has no column {' or '.join(wanted)}; its columns: {', '.join(columns) or 'none'}"
    )


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
