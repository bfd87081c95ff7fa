"""Reading a shard and its sidecar side by side, sample by sample."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from data.storage.clients import UnreadableError
from data.storage.locations import is_remote, open_location, size_of, split
from data.storage.machine import raise_if_machine
from data.storage.shards import REINDEX, Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, Span, printable_key
from data.text.decode import NOT_UTF8, is_text
from data.text.meta import sidecar_location
from data.text.sidecar_record import EmbeddedCaptions

logger = logging.getLogger(__name__)

# The bytes decide what an image is, so that one of these that cannot be decoded is counted by its own reason. Where a
# sample has several, the first of them is taken.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif")
ENDED, UNREADABLE = "shard ended early", "shard unreadable"
NO_IMAGE, NO_EMBEDDING, TEXT_UNREADABLE = "no image", "no embedding", "embeddings unreadable"
NO_CAPTION = "no caption"
# Why a sound picture may be no image of its sample: 1.5.jpg has the key 1, and the files of a sample must be adjacent.
DOTS_IN_KEYS, CAPTION_ALONE = "no image, dots in keys", "no image beside the caption, tar not sorted by name?"


class ShardUnreadable(RuntimeError):
    """A shard or sidecar can't be read, and the config says that the run ends then."""


@dataclass(slots=True)
class RawSample:
    """The encoded bytes of one sample.

    name: SHARD:KEY.  embedding: its bytes, or where they lie.  problem: why the sample cannot be used, or ''.
    """

    name: str
    image: bytes = b""
    embedding: bytes | Span = b""
    caption: bytes = b""
    problem: str = ""


class ShardCursor:
    """Reads a shard and its sidecar side by side, forwards.

    text_folder: '' leaves the embeddings out.  needs_caption: a sample without a caption, or whose caption
    is no text, is then bad, as a sample without an embedding is.
    unreadable: with 'skip' the samples after the point where a shard or sidecar can't be read are bad ones.
    Raises: with unreadable='fail' ShardUnreadable; MachineError; both from here and from read; from read WrongSidecar.
    """

    def __init__(self, shard: Shard, text_folder: str, unreadable: str = "skip", needs_caption: bool = False) -> None:
        self.shard, self.row, self._name, self._needs_caption = shard, 0, shard.name, needs_caption
        fail = unreadable == "fail"
        self._images = _Tar(shard.location, {*IMAGE_EXTENSIONS, "txt"}, shard.size, fail)
        self._texts: _Tar | None = None
        self._embedded: EmbeddedCaptions | None = None
        if text_folder:
            location = sidecar_location(shard, text_folder)
            # Embeddings may be a hundred times as large as the images, so those on a disk are not held in memory.
            self._texts = _Tar(location, {"npy"}, None, fail, spans=not is_remote(location))
            self._embedded = EmbeddedCaptions(location)

    def read(self, row: int) -> RawSample:
        """The sample at a row, at or after self.row. The data of the rows between is not read."""
        if self.row < row:
            self._skip(row - self.row)
        self.row += 1
        sample = self._images.sample()
        if sample is None:
            problem = UNREADABLE if self._images.unreadable else ENDED
            return RawSample(f"{self._name}[{row}]", problem=problem)
        key, members = sample
        embedding, problem = self._embedding(key)
        if self._embedded and "txt" in members and not self._embedded.has(self._name, key, members["txt"]):
            embedding, problem = b"", NO_EMBEDDING
        if self._needs_caption:
            problem = NO_CAPTION if "txt" not in members else "" if is_text(members["txt"]) else NOT_UTF8
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), b"")
        if not image:
            problem = self._no_image(members)
        return RawSample(f"{self._name}:{printable_key(key)}", image, embedding, members.get("txt", b""), problem)

    def _no_image(self, members: dict[str, bytes]) -> str:
        """The reason for a sample without an image, as exactly as its files tell it."""
        unread = self._images.unread
        if any(extension.endswith(tuple(f".{known}" for known in IMAGE_EXTENSIONS)) for extension in unread):
            return DOTS_IN_KEYS
        there = {*members, *unread}
        return CAPTION_ALONE if "txt" in there and there.isdisjoint(IMAGE_EXTENSIONS) else NO_IMAGE

    def _embedding(self, key: str) -> tuple[bytes | Span, str]:
        """The embedding of the sample with this key and '', or nothing and the reason."""
        if self._texts is None:
            return b"", ""
        # The sidecar has the same keys in the same order, without those that have no caption.
        sample = self._texts.sample() if self._texts.key == key else None
        embedding = sample[1].get("npy", b"") if sample else b""
        return embedding, "" if embedding else TEXT_UNREADABLE if self._texts.unreadable else NO_EMBEDDING

    def _skip(self, rows: int) -> None:
        skipped = (self._images.sample(read=False) for _ in range(rows))
        keys = [sample[0] for sample in skipped if sample]
        self.row += rows
        texts = self._texts
        # Embeddings have one size, so a single seek is mostly enough. Over the network that saves many requests.
        if texts is None or (keys and texts.key == keys[0] and texts.try_seek(len(keys), self._images.key)):
            return
        for key in keys:
            if texts.key == key:
                texts.sample(read=False)

    def damages(self) -> list[tuple[str, str]]:
        """(location, reason) of each file that so far could not be read to its end."""
        return [(tar.location, tar.damage) for tar in (self._images, self._texts) if tar and tar.damage]

    def close(self) -> None:
        """Close both files."""
        self._images.close()
        if self._texts:
            self._texts.close()


class _Tar:
    """A tar that is read as far as possible. The error that stops the reading is logged once.

    unreadable: whether the storage failed, rather than the tar being damaged.  damage: the error, or ''.
    fail: raise ShardUnreadable where the storage fails.
    """

    def __init__(self, location: str, extensions: set[str], size: int | None, fail: bool, spans: bool = False) -> None:
        self.unreadable, self.damage, self.location, self._fail = False, "", location, fail
        self._reader: ShardReader | None = None
        try:
            self._file = open_location(location)
            if size is not None and (found := size_of(self._file)) != size:
                raise UnreadableError(
                    f"it has {found} bytes, its index says {size}: {REINDEX.format(split(location)[0])}"
                )
            self._reader = ShardReader(self._file, extensions, spans)
        except (OSError, DamagedTar) as error:
            self._stop(error)

    @property
    def key(self) -> str | None:
        return self._reader.key if self._reader else None

    @property
    def unread(self) -> list[str]:
        return self._reader.unread if self._reader else []

    def sample(self, read: bool = True) -> tuple[str, dict[str, Any]] | None:
        try:
            return self._reader.sample(read) if self._reader else None
        except (OSError, DamagedTar) as error:
            self._stop(error)
            return None

    def try_seek(self, samples: int, key: str | None) -> bool:
        try:
            return self._reader is not None and key is not None and self._reader.try_seek(samples, key)
        except OSError as error:
            self._stop(error)
            return False

    def close(self) -> None:
        if self._reader:
            self._file.close()
            self._reader = None

    def _stop(self, error: Exception) -> None:
        if isinstance(error, OSError):
            raise_if_machine(error, self.location)
        self._reader = None
        self.unreadable = isinstance(error, OSError)
        self.damage = str(error).splitlines()[0] if str(error) else os.strerror(getattr(error, "errno", None) or 5)
        if self.unreadable and self._fail:
            raise ShardUnreadable(
                f"{self.location} cannot be read: {self.damage}; repair it, or set data.unreadable_shard=skip"
            ) from None
        logger.warning("%s cannot be read any further: %s", self.location, self.damage)
