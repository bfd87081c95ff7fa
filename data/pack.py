"""Turn pictures and captions into shards: `python -m data.pack source=FOLDER_OR_TABLE out=DIR`."""

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path

from data.checks import check_at_least, count, one_line
from data.cli import command, location
from data.config import ImageRules
from data.index import Index, index
from data.prepare.arrow_tables import is_saved, list_parquet, list_saved
from data.prepare.columns import Columns
from data.prepare.folder import TABLES, list_folder, parquet_files
from data.prepare.mds import is_mds, list_mds
from data.prepare.packing import another_dataset, check_shard_size, find_changes, read_recipe, write_changes
from data.prepare.rows import Row
from data.prepare.tables import list_table
from data.storage.tars import write_json

RECIPE = "pack.json"


@dataclass
class Pack:
    """Packs pictures and their captions into webdataset shards, the pictures byte for byte.

    A rerun writes again the shards of which a picture or a caption was changed, added or removed, and those missing.

    source: a folder of pictures, each with its caption in a .txt of the same name; or a .csv, .jsonl or .parquet table
    with one column of pictures and one of captions; or a folder of .parquet, or a pattern, 'data/train-*.parquet'; or
    what `save_to_disk` of Hugging Face's datasets or the MDSWriter of mosaicml-streaming wrote. A picture in a table is
    its path, relative to the table's folder, or, but for .csv and .jsonl, its bytes.
    out: folder for the shards.
    shard_size: pictures in a shard.
    image_column: the table's column of pictures; default: the first of path, image, file, file_name, filename and url
    that the table has.
    caption_column: the table's column of captions; default: the first of caption and text that the table has.
    columns: the table's further columns that go into KEY.json; default: all that hold texts, numbers, dates or truth
    values.
    workers: threads that read and check pictures.
    allow_webp: take WebP too, as data.images.allow_webp of the training; only for files that you trust.
    """

    source: str = location()
    out: str = location()
    shard_size: int = 1000
    image_column: str = ""
    caption_column: str = ""
    columns: list[str] = field(default_factory=list)
    workers: int = 8
    allow_webp: bool = False


def pack(args: Pack) -> None:
    """Write the shards that changed, or that are not there yet.

    Raises: ValueError if an argument cannot be, the source holds nothing usable, or out holds another dataset; OSError.
    """
    check_shard_size(args.shard_size)
    check_at_least("workers", args.workers, 1)
    out, rules = Path(args.out), ImageRules(allow_webp=args.allow_webp)
    rows = _list(args, rules)
    source = os.fsencode(Path(args.source).resolve()).decode("utf-8", "backslashreplace")
    recipe = {"source": source, "shard_size": args.shard_size}
    before = read_recipe(out, RECIPE) or recipe
    if before.get("shard_size") != args.shard_size:
        raise another_dataset(out, {"shard_size": before.get("shard_size")}, {"shard_size": args.shard_size})
    changes = find_changes(rows, out, rules)
    # The same pictures at another path are the same dataset.
    if before.get("source") != source and (changes.captions or changes.pictures or changes.removed):
        raise another_dataset(out, before, recipe)
    write_json(out / RECIPE, recipe)
    if write_changes(changes, out, args.shard_size, rules, args.workers):
        index(Index(args.out, workers=1))


def main(argv: list[str] | None = None) -> None:
    command(pack, Pack, argv)


def _list(args: Pack, rules: ImageRules) -> list[Row]:
    source, columns = Path(args.source), Columns(args.image_column, args.caption_column, args.columns)
    shown = one_line(str(source.absolute()), 300)
    try:
        is_folder, is_file = source.is_dir(), source.is_file()
    except OSError as error:  # such as too long a name
        raise ValueError(f"source='{shown}' cannot be read: {error.strerror}") from None
    if is_folder and is_mds(source):
        rows = list_mds(source, columns)
    elif is_folder and is_saved(source):
        rows = list_saved(source, rules, columns)
    elif is_folder and not (files := parquet_files(source, Path(args.out))):
        if args.image_column or args.caption_column or args.columns:
            raise ValueError("image_column=, caption_column= and columns= are for tables, and source= is a folder")
        return list_folder(source, Path(args.out))
    elif is_folder:
        rows = _list_files(files, source, rules, columns)
    elif source.suffix.lower() in TABLES and is_file:
        rows = list_table(source, rules, columns)
    elif source.suffix.lower() == ".parquet" and (found := sorted(map(Path, glob.glob(args.source, recursive=True)))):
        rows = _list_files(found, Path(os.path.commonpath([path.parent for path in found])), rules, columns)
    else:
        raise ValueError(f"source='{shown}' is neither a folder nor a {', '.join(TABLES)} file that exists")
    if columns.left_out:
        print(f"not taken into KEY.json: {one_line(', '.join(columns.left_out), 300)}")
    return rows


def _list_files(files: list[Path], folder: Path, rules: ImageRules, columns: Columns) -> list[Row]:
    print(f"{count(len(files), '.parquet file')}: {files[0]}" + (f" to {files[-1]}" if len(files) > 1 else ""))
    if rows := list_parquet(files, folder, rules, columns):
        return rows
    raise ValueError(f"the .parquet files of '{folder.absolute()}' have no rows")


if __name__ == "__main__":
    main()
