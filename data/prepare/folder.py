"""The pictures of a folder, each with its caption in a .txt beside it."""

import os
from collections.abc import Iterator
from pathlib import Path

from data.images import HEAD, sniff
from data.prepare.rows import NO_PICTURE, Row

# Files of these names are asked for their format only when they are packed.
SUFFIXES = (".jpg", ".jpeg", ".png")
# Captions, and what other tools keep beside a picture.
BESIDE = (".txt", ".json")
TABLES = (".csv", ".jsonl", ".parquet")


def list_folder(folder: Path, out: Path | None = None) -> list[Row]:
    """The files of a folder and of the folders below it, in the order of their paths, but hidden ones, .txt and .json.

    A file that is no picture by its bytes, and a link to a folder, is listed with this as its problem.
    out: a folder to leave out.
    Raises: ValueError if there is no picture.
    """
    rows = sorted(_walk(str(folder), str(out.resolve()) if out else ""), key=lambda row: row.name)
    if all(row.problem for row in rows):
        hint = ""
        if any(row.name.endswith(".tar") for row in rows):
            hint = "; it holds shards already, which need no packing"
        elif tables := [row.name for row in rows if row.name.lower().endswith(TABLES)]:
            hint = f"; it holds a table: give source={os.path.join(folder, tables[0])}"
        raise ValueError(
            f"no {', '.join(SUFFIXES)} in '{folder.absolute()}' or below, nor such a picture under another name{hint}"
        )
    return rows


def parquet_files(folder: Path, out: Path) -> list[Path]:
    """The .parquet files of a folder and of those below it, in order; none where there are pictures or shards too.

    out: a folder to leave out.
    """
    rows = list(_walk(str(folder), str(out.resolve()))) if next(folder.rglob("*.parquet"), None) else []
    if any(not row.problem or row.name.endswith(".tar") for row in rows):
        return []
    return sorted(folder / row.name for row in rows if row.name.lower().endswith(".parquet"))


def _walk(root: str, out: str) -> Iterator[Row]:
    faults: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=faults.append):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != out
        ]
        below = os.path.relpath(folder, root)
        names = set(files)
        for name in links:
            yield Row(_join(below, name), problem="a link to a folder, which is not followed")
        for name in files:
            if not name.startswith(".") and not name.lower().endswith(BESIDE):
                path, caption = os.path.join(folder, name), _caption_name(name, names)
                yield Row(
                    _join(below, name), path, caption_file=caption and os.path.join(folder, caption),
                    problem="" if _may_be_picture(path) else NO_PICTURE,
                )  # fmt: skip
    for fault in faults:
        yield Row(os.path.relpath(fault.filename, root), problem=f"can't be read ({fault.strerror})")


def _join(below: str, name: str) -> str:
    return name if below == "." else os.path.join(below, name)


def _caption_name(name: str, names: set[str]) -> str:
    """The file with the caption of a picture: a.txt, a.TXT or a.jpg.txt for a.jpg; '' if there is none."""
    stem = os.path.splitext(name)[0]
    return next((n for base in (stem, name) for n in (f"{base}.txt", f"{base}.TXT") if n in names), "")


def _may_be_picture(path: str) -> bool:
    """Whether a file is a picture by its name or its bytes, or cannot be read, which is found when it is packed."""
    if path.lower().endswith(SUFFIXES):
        return True
    try:
        if not os.path.isfile(path):
            return os.path.islink(path)  # a link to nothing; a socket or a pipe is no picture
        with open(path, "rb") as file:
            return sniff(file.read(HEAD)) != ""
    except OSError:
        return True
