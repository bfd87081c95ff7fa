"""Digests of captions, by which stored embeddings and a resumed run recognise the samples that they were made from."""

import hashlib
from collections.abc import Iterable, Iterator

from data.storage.caption_fields import TXT

# Hex digits of the digest of a caption, and of a shard.
CAPTION_DIGITS, SHARD_DIGITS = 16, 32


def caption_digest(key: str, caption: bytes) -> str:
    """A hash that changes with the key and with the caption, which is taken byte for byte as it is stored.

    A key that is not UTF-8 in the tar counts with its bytes there.
    """
    name = key.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name + b"\0" + caption, digest_size=CAPTION_DIGITS // 2).hexdigest()


class ShardDigest:
    """The digest of a shard: a hash over the caption digests of its samples in their order, for one caption field.

    A sample without that caption counts with the empty caption.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=SHARD_DIGITS // 2)

    def add(self, key: str, caption: bytes | None) -> str:
        """Add the next sample. Returns its caption_digest."""
        digest = caption_digest(key, caption or b"")
        self._hash.update(bytes.fromhex(digest))
        return digest

    def of(self, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples (key, {extension: bytes}) as they come, each added on its way."""
        for key, members in samples:
            self.add(key, members.get(TXT))
            yield key, members

    def hexdigest(self) -> str:
        """The digest of the samples so far."""
        return self._hash.hexdigest()
