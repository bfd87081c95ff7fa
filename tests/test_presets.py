"""IF's named spacings of the timesteps, computed anew from their sections."""

import re

from train.sampling.sampler import PRESETS

# How many timesteps each of the equal sections of 0 ... 999 has, from the first on.
SECTIONS = {
    "smart27": [7, 4, 2, 1, 2, 4, 7],
    "smart50": [10, 6, 4, 3, 2, 2, 3, 4, 6, 10],
    "smart100": [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13],
    "smart185": [1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20],
    "super27": [1, 1, 1, 1, 1, 1, 1, 2, 5, 13],
    "super40": [2, 2, 2, 2, 2, 2, 3, 4, 6, 15],
    "super100": [4, 4, 6, 6, 8, 8, 10, 10, 14, 30],
}


def spaced(counts: list[int]) -> list[int]:
    """1000 steps in equal sections, the first ones longer by a step if need be; each is cut evenly, its ends included.

    The positions within a section are summed up in floating point, as IF's authors do: that decides ties.
    """
    steps, start = set(), 0
    for number, count in enumerate(counts):
        size = 1000 // len(counts) + (number < 1000 % len(counts))
        position, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1
        for _ in range(count):
            steps.add(start + round(position))
            position += stride
        start += size
    return sorted(steps, reverse=True)


def test_each_preset_is_its_sections():
    assert {name: PRESETS[name] for name in SECTIONS} == {name: spaced(counts) for name, counts in SECTIONS.items()}
    assert set(PRESETS) == {*SECTIONS, "fast27"}
    assert all(len(steps) == int(re.sub(r"\D", "", name)) for name, steps in PRESETS.items())


def test_fast27_has_997_in_place_of_999():
    expected = spaced([10, 10, 3, 2, 2])
    assert expected[0] == 999
    assert PRESETS["fast27"] == [997, *expected[1:]]
    assert PRESETS["fast27"][:4] == [997, 800, 799, 600]
