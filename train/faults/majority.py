"""Which ranks are wrong where all should have found the same; pure functions of what each has found, by rank."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import isfinite
from statistics import median


def outvoted(values: Sequence[Hashable]) -> list[int]:
    """The places whose value is not that of more than half of them; all places where there is no such value."""
    value, votes = Counter(values).most_common(1)[0]
    return [i for i, other in enumerate(values) if other != value or 2 * votes <= len(values)]


def far_off(values: Sequence[float], tolerance: float) -> list[int]:
    """The places whose value is further from the median than its tolerance-th part.

    What is not finite is far off where more than half of the values are finite, and otherwise what is finite.
    """
    finite = [value for value in values if isfinite(value)]
    if 2 * len(finite) <= len(values):
        return [i for i, value in enumerate(values) if isfinite(value)]
    middle = median(finite)
    return [i for i, value in enumerate(values) if not abs(value - middle) <= tolerance * abs(middle)]


def wrong_parts(copies: Sequence[Sequence[int]], masters: Sequence[int]) -> tuple[list[int], list[int]]:
    """Whose copy of the weights is wrong, and whose masters are.

    copies: by rank, a checksum of each part of its weights.  masters: of each rank's masters, rounded; the part of the
    weights with its number was made of them, so they have a vote beside the copies.
    """
    wrong_copies, wrong_masters = set(), []
    for part, master in enumerate(masters):
        wrong = outvoted([*(copy[part] for copy in copies), master])
        if len(copies) in wrong:
            wrong_masters.append(part)
        wrong_copies |= set(wrong) - {len(copies)}
    return sorted(wrong_copies), wrong_masters
