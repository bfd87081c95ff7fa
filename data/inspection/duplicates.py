"""Near duplicates: pictures that look the same at a size of 18 x 16 pixels, whatever their size, quality and format."""

from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 18, 16
# Two pictures are near duplicates if their hashes differ in at most so many of 64 bits, and at most a share of OTHER of
# the values of their small pictures by more than so many of 255 levels. The hash alone takes a red disc and a blue one
# for the same picture. A re-encoded, resized or slightly brighter picture passes, and one with a small mark; a picture
# that was cropped by more than a hundredth does not.
MAX_BITS, MAX_LEVELS, OTHER = 6, 20, 0.02
# A neighbour that is brighter by less is no edge, so that noise in a plain background gives no bits.
EDGE = 3
# Each picture is compared with so many neighbours in each order of the hashes.
NEIGHBOURS = 32
# Pairs whose small pictures are compared at once.
AT_ONCE = 10_000


class Fingerprint(NamedTuple):
    """hash: a difference hash of 64 bits.  small: the picture, uint8 [HEIGHT, WIDTH, 3]."""

    hash: int
    small: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of a picture; the hash tells whether each of 9 x 8 pixels is darker than its right neighbour.

    Source: Krawetz 2013, "Kind of like that" (dHash).
    """
    small = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    grey = small.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = grey.reshape(8, HEIGHT // 8, 9, WIDTH // 9).mean((1, 3))
    bits = grey[:, 1:] >= grey[:, :-1] + EDGE
    return Fingerprint(int.from_bytes(np.packbits(bits).tobytes(), "big"), small)


def near_duplicates(prints: list[Fingerprint]) -> list[list[int]]:
    """Groups of pictures, by their places: each is a near duplicate of the first of its group, the earliest.

    Those with equal fingerprints are found first. Others are looked for among neighbours in four orders of the hashes,
    so time and memory grow with the number of pictures; of very many with almost the same hash some pairs are missed.
    """
    equal: dict[tuple[int, bytes], list[int]] = {}
    for place, (hash_, small) in enumerate(prints):
        equal.setdefault((hash_, small.tobytes()), []).append(place)
    places = list(equal.values())
    first: dict[int, int] = {}
    # Ascending, so that a picture is known to belong to an earlier one before it could begin a group.
    for a, b in _near_pairs([prints[group[0]] for group in places]):
        if a not in first:
            first.setdefault(b, a)
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(places):
        groups.setdefault(first.get(i, i), []).extend(group)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def _near_pairs(prints: list[Fingerprint]) -> list[tuple[int, int]]:
    """Pairs of places of near duplicates, the smaller place first, ascending."""
    if not prints:
        return []
    hashes = np.array([p.hash for p in prints], np.uint64)
    small = np.array([p.small for p in prints], np.uint8).reshape(len(prints), -1)
    brightness = small.mean(1)
    pairs = [np.zeros((0, 2), np.int64)]
    for turn in np.arange(0, 64, 16, dtype=np.uint64):
        # Two hashes that differ in few bits mostly agree in one of four quarters; the one that is first here decides.
        turned = hashes if not turn else (hashes << turn) | (hashes >> (np.uint64(64) - turn))
        order = np.lexsort((brightness, turned))
        for distance in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            a, b = order[:-distance], order[distance:]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= MAX_BITS
            a, b = a[near], b[near]
            for start in range(0, len(a), AT_ONCE):
                some = np.stack([a[start : start + AT_ONCE], b[start : start + AT_ONCE]], 1)
                apart = np.abs(small[some[:, 0]].astype(np.int16) - small[some[:, 1]]) > MAX_LEVELS
                pairs.append(np.sort(some[apart.mean(1) <= OTHER], 1))
    return [(a, b) for a, b in np.unique(np.concatenate(pairs), axis=0).tolist()]
