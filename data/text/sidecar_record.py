"""What the stats file of a sidecar records of its embeddings, so that a check needs no encoder."""

import json
import zlib
from dataclasses import dataclass, field

from data.storage.digests import CAPTION_DIGITS
from data.storage.locations import read_bytes
from data.storage.tars import STATS

# Entries of the stats file, and the hex digits that they have for each embedding, in the order of the sidecar.
CAPTIONS, CHECKSUMS = "captions_blake2b", "npy_crc32"
CHECKSUM_DIGITS = 8


def checksum(npy: bytes) -> str:
    """The CRC-32 of the bytes of an embedding."""
    return f"{zlib.crc32(npy):08x}"


@dataclass(slots=True)
class SidecarRecord:
    """For each embedding, the digest of its key and caption, and the checksum of its .npy."""

    digests: list[str] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)

    def add(self, digest: str, npy: bytes) -> None:
        """Record the next embedding."""
        self.digests.append(digest)
        self.checksums.append(checksum(npy))

    def stats(self) -> dict[str, str]:
        """The entries of the stats file."""
        return {CAPTIONS: "".join(self.digests), CHECKSUMS: "".join(self.checksums)}

    @staticmethod
    def read(sidecar: str) -> "SidecarRecord":
        """The record of a sidecar, from the stats file beside it.

        Raises: ValueError if the file has no record; OSError.
        """
        location = sidecar.removesuffix(".tar") + STATS
        try:
            stats = json.loads(read_bytes(location))
            return SidecarRecord(_cut(stats[CAPTIONS], CAPTION_DIGITS), _cut(stats[CHECKSUMS], CHECKSUM_DIGITS))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{location}' is not of this version of data.embed ({error!r})") from None


def _cut(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]
