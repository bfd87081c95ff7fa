"""Reading a shard and its sidecar side by side."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from data.storage.clients import Unreadable
from data.storage.locations import is_remote, open_location, size_of, split
from data.storage.shards import ANEW, Shard
from data.storage.tar_headers import Damaged
from data.storage.tars import ShardReader, Span
from data.text.meta import sidecar

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
ENDED, UNREADABLE = "shard ended early", "shard unreadable"
NO_IMAGE, NO_EMBEDDING, TEXT_UNREADABLE = "no image", "no embedding", "embeddings unreadable"
NO_CAPTION = "no caption"


class ShardUnreadable(RuntimeError):
    """A shard or sidecar can't be read, and the run is not to go on without it."""


@dataclass(slots=True)
class RawSample:
    """The bytes of one sample, of an embedding maybe only where they lie; or why there are none."""

    name: str
    image: bytes = b""
    embedding: bytes | Span = b""
    caption: bytes = b""
    problem: str = ""


class ShardCursor:
    """Reads a shard and its sidecar side by side, forwards.

    text_folder: '' leaves the embeddings out.  needs_caption: samples without one are bad, as they have no embedding.
    unreadable: 'skip' makes bad samples of those that a shard or sidecar still had when it could be read no more.
    Raises: with unreadable='fail' ShardUnreadable, here and in read.
    """

    def __init__(self, shard: Shard, text_folder: str, unreadable: str = "skip", needs_caption: bool = False) -> None:
        self.shard, self.row, self._name, self._needs_caption = shard, 0, shard.name, needs_caption
        fail = unreadable == "fail"
        self._images = _Tar(shard.location, {*IMAGE_EXTENSIONS, "txt"}, shard.size, fail)
        self._texts: _Tar | None = None
        if text_folder:
            texts = sidecar(shard, text_folder)
            # They may be a hundred times as large as the images: what is at hand on a disk is not held in memory.
            self._texts = _Tar(texts, {"npy"}, None, fail, "" if is_remote(texts) else texts)

    def read(self, row: int) -> RawSample:
        """The sample at a row that is not behind the cursor; the data of rows before it is not read."""
        if self.row < row:
            self._skip(row - self.row)
        self.row += 1
        found = self._images.sample()
        if found is None:
            problem = UNREADABLE if self._images.unreadable else ENDED
            return RawSample(f"{self._name}[{row}]", problem=problem)
        key, members = found
        embedding, problem = self._embedding(key)
        if self._needs_caption and "txt" not in members:
            problem = NO_CAPTION
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), b"")
        return RawSample(
            f"{self._name}:{key}", image, embedding, members.get("txt", b""), problem if image else NO_IMAGE
        )

    def _embedding(self, key: str) -> tuple[bytes | Span, str]:
        """That of the sample with this key, or why there is none."""
        if self._texts is None:
            return b"", ""
        # The sidecar has the same keys in the same order, less those that had no caption.
        found = self._texts.sample() if self._texts.key == key else None
        embedding = found[1].get("npy", b"") if found else b""
        return embedding, "" if embedding else TEXT_UNREADABLE if self._texts.unreadable else NO_EMBEDDING

    def _skip(self, rows: int) -> None:
        passed = (self._images.sample(read=False) for _ in range(rows))
        keys = [sample[0] for sample in passed if sample]
        self.row += rows
        texts = self._texts
        # Embeddings are of one size: one look far ahead is mostly enough, which over the net spares many requests.
        if texts is None or (keys and texts.key == keys[0] and texts.jump(len(keys), self._images.key)):
            return
        for key in keys:
            if texts.key == key:
                texts.sample(read=False)

    def damages(self) -> list[tuple[str, str]]:
        """(location, what stopped the reading) of the files that could not be read to their end so far."""
        return [(tar.location, tar.damage) for tar in (self._images, self._texts) if tar and tar.damage]

    def close(self) -> None:
        """Close both files."""
        self._images.close()
        if self._texts:
            self._texts.close()


class _Tar:
    """A tar that is read as far as it can be; what stops it is logged once."""

    def __init__(self, location: str, extensions: set[str], size: int | None, fail: bool, spans_of: str = "") -> None:
        self.unreadable, self.damage, self.location, self._fail = False, "", location, fail
        self._reader: ShardReader | None = None
        try:
            self._file = open_location(location)
            if size is not None and (now := size_of(self._file)) != size:
                raise Unreadable(f"it has {now} bytes, its index says {size}: {ANEW.format(split(location)[0])}")
            self._reader = ShardReader(self._file, extensions, spans_of)
        except (OSError, Damaged) as error:
            self._stop(error)

    @property
    def key(self) -> str | None:
        return self._reader.key if self._reader else None

    def sample(self, read: bool = True) -> tuple[str, dict[str, Any]] | None:
        try:
            return self._reader.sample(read) if self._reader else None
        except (OSError, Damaged) as error:
            self._stop(error)
            return None

    def jump(self, samples: int, key: str | None) -> bool:
        try:
            return self._reader is not None and key is not None and self._reader.jump(samples, key)
        except OSError as error:
            self._stop(error)
            return False

    def close(self) -> None:
        if self._reader:
            self._file.close()
            self._reader = None

    def _stop(self, error: Exception) -> None:
        self._reader = None
        self.unreadable = isinstance(error, OSError)
        what = str(error).splitlines()[0] if str(error) else os.strerror(getattr(error, "errno", None) or 5)
        self.damage = what
        if self.unreadable and self._fail:
            raise ShardUnreadable(
                f"{self.location} cannot be read: {what}; mend it, or set data.unreadable_shard=skip"
            ) from None
        logger.warning("%s cannot be read any further: %s", self.location, what)
