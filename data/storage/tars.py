"""Reading and writing webdataset shards: KEY.jpg, KEY.txt, KEY.json in NNNNN.tar, counts in NNNNN_stats.json."""

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.digests import ShardDigest
from data.storage.local_files import PooledFile
from data.storage.locations import open_location, whole_file, write_whole
from data.storage.tar_headers import BLOCK, DamagedTar, TarHeaders, padded

logger = logging.getLogger(__name__)

# img2dataset's name for the counts of a shard, in place of .tar.
STATS = "_stats.json"
# Entries of the stats file: the shard's digest; of a sidecar the digest of the shard that it embeds, and its own bytes.
DIGEST, SOURCE_DIGEST, BYTES = "digest", "source_digest", "bytes"
# Members of a webdataset that describe it and are not samples.
META_FOLDER = re.compile(r"__[^/]*__(/|$)")

Sample = tuple[str, dict[str, bytes]]


def write_shard(path: Path | str, samples: Iterable[Sample], stats: dict | None = None) -> None:
    """Write a tar and the stats file beside it, each atomically.

    The stats file is written last, so a tar without one was interrupted and must be written again.
    samples: (key, {extension: bytes}), written in this order as they come. Equal samples give equal bytes.
    stats: entries of the stats file beside the number of samples and the shard's digest.
    Raises: OSError.
    """
    digest = ShardDigest()
    count = write_tar(path, digest.of(samples))
    write_stats(path, count, {DIGEST: digest.hexdigest(), **(stats or {})})


def write_tar(path: Path | str, samples: Iterable[Sample], aside: Path | None = None) -> int:
    """Write the samples as a tar, at a path or on S3, without its stats file. Returns how many there were.

    samples: as for write_shard.  aside: as for whole_file.
    Raises: OSError.
    """
    import webdataset as wds  # here, since it imports torch, which commands that only read shards do not need

    count = 0
    with (
        whole_file(str(path), aside) as part,
        open(part, "wb") as file,
        wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for key, members in samples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


def write_stats(shard: Path | str, samples: int, more: dict) -> None:
    """Write the stats file of a shard: the number of its samples, then the entries of `more`, which may replace it.

    Raises: OSError.
    """
    write_json(stats_location(str(shard)), {"count": samples, "successes": samples, **more})


def write_json(path: Path | str, value: object) -> None:
    """Write a JSON file atomically.

    Raises: OSError.
    """
    write_whole(str(path), (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def stats_path(shard: Path) -> Path:
    """The path of the stats file of a shard, as img2dataset names it."""
    return shard.with_name(shard.stem + STATS)


def stats_location(shard: str) -> str:
    """The location of the stats file of a shard, a path or a URL."""
    return shard.removesuffix(".tar") + STATS


class Span(NamedTuple):
    """Where the data of a member lies in a local tar, so that it can be read when it is needed."""

    file: PooledFile
    offset: int
    size: int

    def read(self) -> bytes:
        """The data, or less of it if the tar was cut since.

        Raises: OSError.
        """
        data = bytearray(self.size)
        return bytes(data[: self.read_into(data)])

    def read_into(self, *buffers: Any) -> int:
        """Fill these buffers one after the other with the data. Returns the number of bytes read.

        Raises: OSError.
        """
        return self.file.read_at(self.offset, *buffers)


class ShardReader:
    """Reads the samples of a tar in order. A sample is a run of files with the same key: the name up to its first dot.

    Names without a dot, and files in a folder `__name__`, are ignored. A file that comes twice in a sample counts as
    empty. A sparse file, and one that is too large, is passed over; if its extension is wanted it is missing in its
    sample, and a line in the log names it. The sample at which a tar is cut or damaged is lost, so that the number of
    samples does not depend on whether their data is read.

    file: as open_location returns it.
    key: of the next sample, None at the end.
    unread: the extensions of the last sample's files that were not read, unless all its data was skipped.
    spans: return a Span in place of the data of each file. The tar must be local.
    Raises: DamagedTar.
    """

    def __init__(self, file: BinaryIO, extensions: set[str], spans: bool = False) -> None:
        self._file, self._headers, self._extensions = file, TarHeaders(file), extensions
        self._span_file: PooledFile | None = cast(io.BufferedReader, file).raw.file if spans else None  # type: ignore[attr-defined]
        self.key: str | None = None
        self.unread: list[str] = []
        self._extension, self._size, self._fault = "", 0, ""
        self._next(0)

    def sample(self, read: bool = True) -> tuple[str, dict[str, Any]] | None:
        """key and {extension: bytes or Span} of the next sample, None at the end. read=False skips all data.

        Raises: DamagedTar.
        """
        key = self.key
        members: dict[str, Any] = {}
        self.unread = []
        if key is None:
            return None
        while self.key == key:
            if read and self._extension in self._extensions and not self._fault:
                lies_at = self._span_file if self._size else None
                data = Span(lies_at, self._file.tell(), self._size) if lies_at else self._file.read(self._size)
                members[self._extension] = b"" if self._extension in members else data
                self._next(padded(self._size) if lies_at else -self._size % BLOCK)
            else:
                if read:
                    self._note_unread(key)
                self._next(padded(self._size))
        return key, members

    def _note_unread(self, key: str) -> None:
        self.unread.append(self._extension)
        if self._fault and self._extension in self._extensions:
            where = getattr(self._file, "name", "a tar")
            logger.warning("%s: %s.%s %s and is left out", where, key, self._extension, self._fault)

    def try_seek(self, samples: int, key: str) -> bool:
        """Seek so many samples ahead, as if each were one file of the current size; undone unless `key` is there."""
        position, current = self._file.tell(), (self.key, self._extension, self._size, self._fault)
        self._file.seek(position - BLOCK + samples * (BLOCK + padded(self._size)))
        try:
            self._next(0)
        except DamagedTar:
            self.key = None
        if self.key != key:
            self._file.seek(position)
            self.key, self._extension, self._size, self._fault = current
        return self.key == key

    def _next(self, skip: int) -> None:
        """Go to the next file that belongs to a sample."""
        self.key = None
        while (member := self._headers.next(skip)) is not None:
            name, self._size, self._fault = member
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if dot and stem and not (name.startswith("__") and META_FOLDER.match(name)):
                self.key, self._extension = folder + slash + stem, extension.lower()
                return
            skip = padded(self._size)


def sample_name(shard_name: str, key: str) -> str:
    """SHARD:KEY, by which messages name a sample."""
    return f"{shard_name.removesuffix('.tar')}:{printable_key(key)}"


def printable_key(key: str) -> str:
    r"""A key for a message; bytes that are not UTF-8 are written as \xNN."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_shard(location: str | Path, extensions: set[str]) -> Iterator[Sample]:
    """The samples of a shard in order: (key, {extension: bytes}), with the given extensions only.

    A sample that has none of them comes with an empty dict. Nothing is decoded.
    Raises: OSError, DamagedTar (a ValueError).
    """
    with open_location(str(location)) as file:
        reader = ShardReader(file, extensions)
        while (sample := reader.sample()) is not None:
            yield sample


class Scan(NamedTuple):
    """What the headers and captions of a shard say.

    samples: how many.  digests: ShardDigest of them for each caption field.
    damage: what stopped the reading before its end, or ''.
    """

    samples: int
    digests: dict[str, str]
    damage: str


def scan_shard(location: str | Path, fields: Sequence[str] = (TXT,)) -> Scan:
    """Count the samples of a shard and digest their captions of these fields. Nothing else is read but headers.

    Raises: OSError.
    """
    count, digests, damage = 0, {field: ShardDigest() for field in fields}, ""
    try:
        for key, members in read_shard(location, caption_extensions(fields)):
            captions = find_captions(members, fields)
            for field, digest in digests.items():
                digest.add(key, captions.get(field))
            count += 1
    except DamagedTar as error:
        damage = str(error)
    return Scan(count, {field: digest.hexdigest() for field, digest in digests.items()}, damage)


def shard_digest(location: str | Path) -> str:
    """The digest of a shard, from its headers and txt captions; of a damaged one that of the samples before the damage.

    Raises: OSError.
    """
    return scan_shard(location).digests[TXT]
