"""Reading and writing of webdataset shards: KEY.jpg, KEY.txt, KEY.json in NNNNN.tar, counts in NNNNN_stats.json."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import webdataset as wds


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]], stats: dict | None = None) -> None:
    """Write one tar and the stats file beside it, each aside and then renamed.

    samples: (key, {extension: bytes}) in the order they shall have. The same samples give the same bytes.
    stats: what the stats file shall say beyond the number of samples.
    The stats file comes last, so a tar without one was cut short and is to be written again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tar.part")
    with open(aside, "wb") as file:
        with wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for key, members in samples:
                tar.write({"__key__": key, **members})
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    write_json(stats_path(path), {"count": len(samples), "successes": len(samples), **(stats or {})})


def write_json(path: Path, value: object) -> None:
    """Write JSON aside, then rename."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def stats_path(shard: Path) -> Path:
    """Where img2dataset leaves the counts of a shard."""
    return shard.with_name(shard.stem + "_stats.json")


def read_shard(path: Path, extensions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard in their order: (key, {extension: bytes}), with the named extensions only.

    A sample that has none of them comes with an empty dict. Nothing is decoded.
    """
    with open(path, "rb") as file:
        members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        for sample in wds.tariterators.group_by_keys(members, suffixes=extensions):
            yield sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")}
