"""Every random draw of a training run: keyed by what it is for and which sample it is for, never by who makes it.

The same sample in the same epoch so gets the same crop, dropout, timestep and noise on any number of ranks, workers
and restarts, and a checkpoint needs no state of any generator.
"""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a draw is for; the numbers are part of what makes a run repeatable, so they never change."""

    SHARD_ORDER = 0
    BLOCK_ORDER = 1
    CROP = 2
    DROPOUT = 3
    TIMESTEP = 4
    NOISE = 5


def generator(seed: int, draw: Draw, *key: int) -> np.random.Generator:
    """A generator for one draw; equal arguments give equal numbers on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(draw), *key])))


class Draws:
    """The generators of one purpose, by sample: what takes generator() 10 us takes one that is moved about 1 us.

    Philox turns a key and a counter of four words into numbers (Salmon et al. 2011). The seed and the purpose give the
    key, the sample a word of the counter, so every sample has 2**66 numbers of its own.
    """

    def __init__(self, seed: int, draw: Draw) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence([seed, int(draw)]))
        self._start, self._generator = self._bits.state, np.random.Generator(self._bits)

    def at(self, visit: int) -> np.random.Generator:
        """The generator at the first number of a visit, good until the next call."""
        self._start["state"]["counter"][1] = visit
        self._bits.state = self._start
        return self._generator
