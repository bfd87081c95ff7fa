"""Reading a shard and its sidecars side by side, sample by sample."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from data.config import CaptionConfig
from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.clients import UnreadableError
from data.storage.locations import is_remote, open_location, size_of, split
from data.storage.machine import raise_if_machine
from data.storage.shards import REINDEX, Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, Span, printable_key
from data.text.decode import NOT_UTF8, is_text
from data.text.meta import caption_folder, sidecar_location
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

    name: SHARD:KEY.  embedding: of the caption; its bytes, or where they lie.
    problem: why the sample cannot be used, or ''.
    chosen: the field of the caption.  others: the captions of other fields.
    lacks: whether the sample has not all the captions among which one was chosen.
    """

    name: str
    image: bytes = b""
    embedding: bytes | Span = b""
    caption: bytes = b""
    problem: str = ""
    chosen: str = TXT
    others: dict[str, bytes] = field(default_factory=dict)
    lacks: bool = False


def choose_caption(weights: Sequence[float], draw: float) -> int:
    """The index of the caption that a uniform draw in [0, 1) gives, each in proportion to its weight."""
    ends = list(accumulate(weights))
    return next((i for i, end in enumerate(ends) if draw * ends[-1] < end), len(ends) - 1)


class ShardCursor:
    """Reads a shard and its sidecars side by side, forwards.

    text_folder: '' leaves the embeddings out.  needs_caption: a sample without a caption, or whose caption
    is no text, is then bad, as a sample without an embedding is.
    captions: those among which one is chosen for each sample; by default KEY.txt alone.
    unreadable: with 'skip' the samples after the point where a shard or sidecar can't be read are bad ones.
    Raises: with unreadable='fail' ShardUnreadable; MachineError; both from here and from read; from read WrongSidecar.
    """

    def __init__(
        self, shard: Shard, text_folder: str, unreadable: str = "skip", needs_caption: bool = False,
        captions: Sequence[CaptionConfig] = (CaptionConfig(),),
    ) -> None:  # fmt: skip
        self.shard, self.row, self._name, self._needs_caption = shard, 0, shard.name, needs_caption
        fail = unreadable == "fail"
        self._weights = {caption.field: caption.weight for caption in captions}
        self._images = _Tar(shard.location, {*IMAGE_EXTENSIONS, *caption_extensions(self._weights)}, shard.size, fail)
        self._sidecars: dict[str, _Sidecar] = {}
        if text_folder:
            folders = {name: caption_folder(text_folder, name) for name in self._weights}
            self._sidecars = {name: _Sidecar(sidecar_location(shard, folders[name]), fail) for name in folders}

    def read(self, row: int, draw: float = 0.0) -> RawSample:
        """The sample at a row, at or after self.row. The data of the rows between is not read.

        draw: in [0, 1), chooses among the captions that the sample has; 0 gives the first of them.
        """
        if self.row < row:
            self._skip(row - self.row)
        self.row += 1
        sample = self._images.sample()
        if sample is None:
            problem = UNREADABLE if self._images.unreadable else ENDED
            return RawSample(f"{self._name}[{row}]", problem=problem)
        key, members = sample
        captions = find_captions(members, self._weights)
        name, lacks = self._choose(captions, draw)
        caption = captions.pop(name, None)
        embedding, problem = self._embedding(key, name, caption)
        if self._needs_caption:
            problem = NO_CAPTION if caption is None else "" if is_text(caption) else NOT_UTF8
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), b"")
        if not image:
            problem = self._no_image(members)
        named = f"{self._name}:{printable_key(key)}"
        return RawSample(named, image, embedding, caption or b"", problem, name, captions, lacks)

    def _choose(self, captions: dict[str, bytes], draw: float) -> tuple[str, bool]:
        """The field of the caption to take, and whether the sample lacks one of them, or has one that is no text.

        What the shard has decides, not what is embedded, so that damage to embeddings changes no other sample.
        """
        fields = list(self._weights)
        if len(fields) == 1:
            return fields[0], False
        # Where none is text, the first that is there tells why.
        usable = [f for f in fields if f in captions and is_text(captions[f])] or [f for f in fields if f in captions]
        if not usable:
            return fields[0], True
        return usable[choose_caption([self._weights[f] for f in usable], draw)], len(usable) < len(fields)

    def _no_image(self, members: dict[str, bytes]) -> str:
        """The reason for a sample without an image, as exactly as its files tell it."""
        unread = self._images.unread
        if any(extension.endswith(tuple(f".{known}" for known in IMAGE_EXTENSIONS)) for extension in unread):
            return DOTS_IN_KEYS
        there = {*members, *unread}
        return CAPTION_ALONE if "txt" in there and there.isdisjoint(IMAGE_EXTENSIONS) else NO_IMAGE

    def _embedding(self, key: str, name: str, caption: bytes | None) -> tuple[bytes | Span, str]:
        """The embedding of a sample's caption of a field and '', or nothing and the reason.

        Raises: WrongSidecar.
        """
        if not self._sidecars:
            return b"", ""
        for other, sidecar in self._sidecars.items():
            if other != name:
                sidecar.passed.append(key)
        embedding, problem = self._sidecars[name].read(key)
        if caption is not None and not self._sidecars[name].embedded.has(self._name, key, caption):
            return b"", NO_EMBEDDING
        return embedding, problem

    def _skip(self, rows: int) -> None:
        skipped = (self._images.sample(read=False) for _ in range(rows))
        keys = [sample[0] for sample in skipped if sample]
        self.row += rows
        for sidecar in self._sidecars.values():
            sidecar.passed += keys

    def damages(self) -> list[tuple[str, str]]:
        """(location, reason) of each file that so far could not be read to its end."""
        tars = [self._images, *(sidecar.tar for sidecar in self._sidecars.values())]
        return [(tar.location, tar.damage) for tar in tars if tar.damage]

    def close(self) -> None:
        """Close all files."""
        self._images.close()
        for sidecar in self._sidecars.values():
            sidecar.tar.close()


class _Sidecar:
    """The embeddings of one caption field of a shard: the same keys in the same order, without those that have none.

    passed: the keys of the samples that were passed over since the last one that was read.
    embedded: tells whether the sidecar was made from a caption.
    """

    def __init__(self, location: str, fail: bool) -> None:
        # Embeddings may be a hundred times as large as the images, so those on a disk are not held in memory.
        self.tar = _Tar(location, {"npy"}, None, fail, spans=not is_remote(location))
        self.passed: list[str] = []
        self.embedded = EmbeddedCaptions(location)

    def read(self, key: str) -> tuple[bytes | Span, str]:
        """The embedding under a key and '', or nothing and the reason. The key's sample is then passed."""
        passed, self.passed = self.passed, []
        # Embeddings have one size, unless they are lowrank, so a single seek is mostly enough. Over the network that
        # saves many requests.
        if passed and not (self.tar.key == passed[0] and self.tar.try_seek(len(passed), key)):
            for other in passed:
                if self.tar.key == other:
                    self.tar.sample(read=False)
        sample = self.tar.sample() if self.tar.key == key else None
        embedding = sample[1].get("npy", b"") if sample else b""
        return embedding, "" if embedding else TEXT_UNREADABLE if self.tar.unreadable else NO_EMBEDDING


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
