"""What the stats file of a sidecar records of its embeddings, so that to check them needs no encoder."""

import json
import logging
import zlib
from dataclasses import dataclass, field

import numpy as np

from data.storage.digests import CAPTION_DIGITS, caption_digest
from data.storage.locations import read_bytes
from data.storage.machine import raise_if_machine
from data.storage.tars import BYTES, SOURCE_DIGEST, STATS, printable_key
from data.text.decode import is_text

logger = logging.getLogger(__name__)

# Entries of the stats file with something of each embedding, in the order of the sidecar.
CAPTIONS, CHECKSUMS = "captions_blake2b", "npy_crc32"
CHECKSUM_DIGITS = 8


class WrongSidecar(ValueError):
    """Embeddings are of other captions than those of the shard that they are used with."""


def checksum(npy: bytes) -> str:
    """The CRC-32 of the bytes of an embedding."""
    return f"{zlib.crc32(npy):08x}"


@dataclass(slots=True)
class SidecarRecord:
    """For each embedding, the digest of its key and caption, and the checksum of its .npy.

    source: the digest of the shard that was embedded.  size: of the sidecar, in bytes.  Both are None if not recorded.
    """

    digests: list[str] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)
    source: str | None = None
    size: int | None = None

    def add(self, digest: str, npy: bytes) -> None:
        """Record the next embedding."""
        self.digests.append(digest)
        self.checksums.append(checksum(npy))

    def stats(self) -> dict[str, object]:
        """The entries of the stats file."""
        lists = {CAPTIONS: "".join(self.digests), CHECKSUMS: "".join(self.checksums)}
        return {SOURCE_DIGEST: self.source, BYTES: self.size, **lists}

    @staticmethod
    def read(sidecar: str) -> "SidecarRecord":
        """The record of a sidecar, from the stats file beside it.

        Raises: ValueError if the file has no record; OSError.
        """
        location = sidecar.removesuffix(".tar") + STATS
        try:
            stats = json.loads(read_bytes(location))
            return SidecarRecord(
                _cut(stats[CAPTIONS], CAPTION_DIGITS), _cut(stats[CHECKSUMS], CHECKSUM_DIGITS),
                stats.get(SOURCE_DIGEST), stats.get(BYTES),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{location}' is not of this version of data.embed ({error!r})") from None


class EmbeddedCaptions:
    """Tells whether a sidecar has the embedding of a caption, by the record in its stats file.

    Where there is no record, as for embeddings that other software wrote, it has all.
    """

    def __init__(self, sidecar: str) -> None:
        self._sidecar, self._digests = sidecar, None
        try:
            digests = "".join(SidecarRecord.read(sidecar).digests)
            self._digests = np.sort(np.frombuffer(bytes.fromhex(digests), ">u8"))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                raise_if_machine(error, sidecar)
            logger.debug("the captions of %s cannot be compared: %s", sidecar, error)

    def has(self, shard: str, key: str, caption: bytes) -> bool:
        """Whether there is an embedding of this caption under this key; False if the caption is not text.

        Raises: WrongSidecar if the sidecar was made from other captions.
        """
        if self._digests is None:
            return True
        digest = np.uint64(int(caption_digest(key, caption), 16))
        at = int(self._digests.searchsorted(digest))
        if at < len(self._digests) and self._digests[at] == digest:
            return True
        if not is_text(caption):
            return False
        raise WrongSidecar(
            f"'{self._sidecar}' has no embedding of the caption of {printable_key(key)} in '{shard}': it was made from "
            "other shards, or the caption was changed since; run data.embed for these shards, which makes anew what "
            "changed, or name their own embeddings"
        )


def _cut(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]
