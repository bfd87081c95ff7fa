"""Reading and writing of webdataset shards: KEY.jpg, KEY.txt, KEY.json in NNNNN.tar, counts in NNNNN_stats.json."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds

from data.storage.locations import open_location, write_whole
from data.storage.tar_headers import BLOCK, Damaged, TarHeaders, padded

# img2dataset's name for the counts of a shard, in place of .tar.
STATS = "_stats.json"
# Members of a webdataset that describe it and are no samples.
META_FOLDER = re.compile(r"__[^/]*__(/|$)")


def write_shard(
    path: Path, samples: Iterable[tuple[str, dict[str, bytes]]], stats: dict | None = None, aside: Path | None = None
) -> None:
    """Write one tar and the stats file beside it, each aside and then renamed.

    samples: (key, {extension: bytes}) in the order they shall have, written as they come. The same give the same bytes.
    stats: what the stats file shall say beyond the number of samples; looked at once they are written.
    aside: where the tar is written first; beside the path by default.
    The stats file comes last, so a tar without one was cut short and is to be written again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, count = aside or path.with_suffix(".tar.part"), 0
    with open(aside, "wb") as file:
        with wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for key, members in samples:
                tar.write({"__key__": key, **members})
                count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _opened.cache_clear()  # it may hold the tar that was there before
    write_json(stats_path(path), {"count": count, "successes": count, **(stats or {})})


def write_json(path: Path, value: object) -> None:
    """Write JSON aside, then rename."""
    write_whole(str(path), (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def stats_path(shard: Path) -> Path:
    """Where img2dataset leaves the counts of a shard."""
    return shard.with_name(shard.stem + STATS)


@lru_cache(maxsize=64)  # a block of small tars may lie in more, and a process may open so many only
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")


class Span(NamedTuple):
    """Where the data of a file lies in a local tar, to be read when it is needed."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The data, or less of it if the tar was cut since."""
        data = bytearray(self.size)
        return bytes(data[: self.read_into(data)])

    def read_into(self, *parts: Any) -> int:
        """Fill these buffers one after the other with the data; how many bytes there were.

        Raises: OSError.
        """
        return os.preadv(_opened(self.path).fileno(), list(parts), self.offset)


class ShardReader:
    """The samples of a tar, forwards: runs of files with the same key, which is the name up to its base's first dot.

    Names without a dot, and what lies in a folder `__name__`, are passed over. A file that comes twice in a sample
    counts as empty. The sample at which a tar is cut or damaged is lost, so that there are as many samples whether
    their data is read or not. key: of the next sample, None at the end.
    spans_of: path of the tar, if a Span shall stand for the data of each file.
    Raises: Damaged.
    """

    def __init__(self, file: BinaryIO, extensions: set[str], spans_of: str = "") -> None:
        self._file, self._headers, self._extensions, self._spans_of = file, TarHeaders(file), extensions, spans_of
        self.key: str | None = None
        self._extension, self._size = "", 0
        self._next(0)

    def sample(self, read: bool = True) -> tuple[str, dict[str, Any]] | None:
        """key and {extension: bytes or Span} of the next sample, None at the end; read=False passes over all data.

        Raises: Damaged.
        """
        key = self.key
        found: dict[str, Any] = {}
        if key is None:
            return None
        while self.key == key:
            if read and self._extension in self._extensions:
                as_span = self._spans_of and self._size
                data = Span(self._spans_of, self._file.tell(), self._size) if as_span else self._file.read(self._size)
                found[self._extension] = b"" if self._extension in found else data
                self._next(padded(self._size) if as_span else -self._size % BLOCK)
            else:
                self._next(padded(self._size))
        return key, found

    def jump(self, samples: int, key: str) -> bool:
        """Whether so many samples further on a key stands if each is one file of one size; goes there if it does."""
        here, there = self._file.tell(), (self.key, self._extension, self._size)
        self._file.seek(here - BLOCK + samples * (BLOCK + padded(self._size)))
        try:
            self._next(0)
        except Damaged:
            self.key = None
        if self.key != key:
            self._file.seek(here)
            self.key, self._extension, self._size = there
        return self.key == key

    def _next(self, skip: int) -> None:
        """Go to the next file that belongs to a sample."""
        self.key = None
        while (member := self._headers.next(skip)) is not None:
            name, self._size = member
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if dot and stem and not (name.startswith("__") and META_FOLDER.match(name)):
                self.key, self._extension = folder + slash + stem, extension.lower()
                return
            skip = padded(self._size)


def read_shard(location: str | Path, extensions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard in their order: (key, {extension: bytes}), with the named extensions only.

    A sample that has none of them comes with an empty dict. Nothing is decoded.
    Raises: OSError, Damaged (a ValueError).
    """
    with open_location(str(location)) as file:
        reader = ShardReader(file, extensions)
        while (sample := reader.sample()) is not None:
            yield sample


def count_samples(location: str | Path) -> tuple[int, str]:
    """How many samples a shard has, from its headers alone, and what keeps it from being read to its end.

    Raises: OSError.
    """
    count = 0
    with open_location(str(location)) as file:
        try:
            reader = ShardReader(file, set())
            while reader.sample(read=False) is not None:
                count += 1
        except Damaged as damage:
            return count, str(damage)
    return count, ""
