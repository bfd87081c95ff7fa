"""Turn pictures and captions into shards: `python -m data.pack source=FOLDER_OR_TABLE out=DIR`."""

import os
from dataclasses import dataclass
from pathlib import Path

from data.checks import one_line
from data.cli import command, location
from data.config import ImageRules
from data.index import Index, index
from data.prepare.folder import TABLES, list_folder
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
    with one column of pictures and one of captions. A picture is its path, relative to the table's folder, or in a
    .parquet its bytes.
    out: folder for the shards.
    shard_size: pictures in a shard.
    image_column: the table's column of pictures; default: the first of path, image, file, file_name, filename and url
    that the table has.
    caption_column: the table's column of captions; default: the first of caption and text that the table has.
    allow_webp: take WebP too, as data.images.allow_webp of the training; only for files that you trust.
    """

    source: str = location()
    out: str = location()
    shard_size: int = 1000
    image_column: str = ""
    caption_column: str = ""
    allow_webp: bool = False


def pack(args: Pack) -> None:
    """Write the shards that changed, or that are not there yet.

    Raises: ValueError if an argument cannot be, the source holds nothing usable, or out holds another dataset; OSError.
    """
    check_shard_size(args.shard_size)
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
    if write_changes(changes, out, args.shard_size, rules):
        index(Index(args.out, workers=1))


def main(argv: list[str] | None = None) -> None:
    command(pack, Pack, argv)


def _list(args: Pack, rules: ImageRules) -> list[Row]:
    source = Path(args.source)
    shown = one_line(str(source.absolute()), 300)
    try:
        is_folder, is_file = source.is_dir(), source.is_file()
    except OSError as error:  # such as too long a name
        raise ValueError(f"source='{shown}' cannot be read: {error.strerror}") from None
    if is_folder:
        if args.image_column or args.caption_column:
            raise ValueError("image_column= and caption_column= are for tables, and source= is a folder")
        return list_folder(source, Path(args.out))
    if source.suffix.lower() in TABLES and is_file:
        return list_table(source, rules, args.image_column, args.caption_column)
    raise ValueError(f"source='{shown}' is neither a folder nor a {', '.join(TABLES)} file that exists")


if __name__ == "__main__":
    main()
