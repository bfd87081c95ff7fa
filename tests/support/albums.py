"""Pictures with captions to pack, and what the shards hold then."""

import io
import json
import os
import shutil
from pathlib import Path

from PIL import Image

from data import pack
from data.storage.shards import find_shards
from data.storage.tars import read_shard

MEMBERS = {"jpg", "png", "webp", "txt", "json"}


def picture(colour: str, form: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """A picture of one colour in a format of Pillow's."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, form)
    return data.getvalue()


def put(folder: Path, name: str, image: bytes, caption: str | bytes | None = None) -> None:
    """Write a picture, and its caption beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if caption is not None:
        text = caption.encode() if isinstance(caption, str) else caption
        path.with_suffix(".txt").write_bytes(text)


def run(source: Path, out: Path, shard_size: int = 1000, **more: object) -> None:
    """Run data.pack."""
    pack.main([f"source={source}", f"out={out}", f"shard_size={shard_size}", *(f"{k}={v}" for k, v in more.items())])


def samples(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    """All samples in order."""
    return [sample for shard in find_shards(folder) for sample in read_shard(shard.location, MEMBERS)]


def captions(folder: Path) -> list[str]:
    """All captions in order."""
    return [members["txt"].decode() for _, members in samples(folder)]


def by_name(folder: Path) -> dict[str, tuple[str, str]]:
    """Name in the source -> (key, caption)."""
    return {json.loads(m["json"])["url"]: (key, m["txt"].decode()) for key, m in samples(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    """When each file of a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def replace_later(path: Path, data: bytes) -> None:
    """Write a file anew in a way that leaves its size, if the data has it, and its time of change as they were."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def move(source: Path, to: Path) -> Path:
    """Move a folder."""
    shutil.move(source, to)
    return to
