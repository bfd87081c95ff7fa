"""How many different captions there are among very many, in little memory."""

from collections.abc import Iterable

from data.storage.digests import caption_digest

# Hashes that are held at most: up to so many different captions the number is exact.
LIMIT = 1 << 20


class DistinctCaptions:
    """Counts different captions: exactly up to `limit`, beyond that from a share of their hashes that is held.

    Each time that there are too many, those whose next bit is set are let go. The number that is left, doubled as
    often, has a relative error of about 1 / sqrt(limit), 0.1 %. Source: Gibbons 2001, "Distinct sampling".
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._hashes, self._bits = limit, set[int](), 0

    def add(self, captions: Iterable[bytes]) -> None:
        """Add captions, byte for byte as they are stored."""
        hashes = (int(caption_digest("", caption), 16) for caption in captions)
        self._hashes |= {h for h in hashes if not h & ((1 << self._bits) - 1)}
        while len(self._hashes) > self._limit:
            self._hashes = {h for h in self._hashes if not h >> self._bits & 1}
            self._bits += 1

    @property
    def exact(self) -> bool:
        """Whether the count is no estimate."""
        return not self._bits

    @property
    def count(self) -> int:
        """The number of different captions."""
        return len(self._hashes) << self._bits

    def repeats(self, captions: int) -> str:
        """Of so many captions those that equal an earlier one, in words; '' if there are none."""
        number = max(captions - self.count, 0)
        about = "" if self.exact else "about "
        return f"{about}{number:,} of them ({number / captions:.1%}) equal an earlier one" if number else ""
