"""The order of the samples: a pure function of the seed, the shards' counts and the position.

Position g = step x global batch + slot. An epoch is N successive positions, N being the number of samples. Positions
are dealt to virtual streams: slot i of a step goes to stream i x streams // global_batch of that step's phase, which is
step % phases. For each epoch the shards are permuted and joined into one line of samples. Each stream gets the next
piece of the line, as long as the number of its positions in that epoch, reads it in blocks and permutes each block. So
every sample comes once an epoch, the order does not depend on ranks or workers, and a run resumes from its step alone.
(mosaicml/streaming calls this elastic determinism; here it is for plain tars.)
"""

from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from data.loader.draws import Draw, generator

Ints = TypeVar("Ints", int, np.ndarray)


class Block(NamedTuple):
    """Successive samples of the line that one stream reads and shuffles together."""

    epoch: int
    stream: int
    number: int


class Order:
    """The order of samples of one run.

    counts: samples per shard.  streams: pieces of one batch, at most global_batch; if it is a multiple of the number of
    ranks, no shard is read by two ranks.  phases: number of sets of streams, among which successive steps take turns,
    so that as many workers can read side by side.  block_size: samples shuffled together.
    stored: rows of each shard's tar, where counts are of those that are chosen; default: counts.
    Raises: ValueError.
    """

    def __init__(
        self, seed: int, counts: list[int], global_batch: int, streams: int, phases: int, block_size: int,
        stored: list[int] | None = None,
    ) -> None:  # fmt: skip
        assert 1 <= streams <= global_batch and phases >= 1 and block_size >= 1  # checked where a user sets them
        self.seed, self.global_batch, self.block_size = seed, global_batch, block_size
        self.streams, self.phases = streams, phases
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first_index = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.first_index[-1])
        if self.samples < 1 or self.counts.min() < 0:
            raise ValueError(f"{len(self.counts)} shards with {self.samples} samples in all: none of them can be read")
        self._first_row = np.concatenate([[0], np.cumsum(counts if stored is None else stored, dtype=np.int64)])
        self._line = lru_cache(maxsize=2)(self._compute_line)
        self._pieces = lru_cache(maxsize=2)(self._compute_pieces)

    def locate(self, step: int, slot: int) -> tuple[Block, int]:
        """The block of the sample at a step's slot, and the sample's index in the block's shuffled order."""
        epoch, stream, number, within = self.locate_all(step * self.global_batch + slot)
        return Block(epoch, stream, number), within

    def locate_all(self, position: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """epoch, stream, number of the block and index in its shuffled order, of one position or of an array [n]."""
        step, slot = divmod(position, self.global_batch)
        epoch = position // self.samples
        stream = step % self.phases * self.streams + slot * self.streams // self.global_batch
        index = self._dealt_to(stream, position) - self._dealt_to(stream, epoch * self.samples)
        number, within = divmod(index, self.block_size)
        return epoch, stream, number, within

    def rows(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a block: the shard [n] of each sample and its number there [n], by the line, and their permutation [n]."""
        pieces = self._pieces(block.epoch)
        first = pieces[block.stream] + block.number * self.block_size
        in_line = np.arange(first, min(first + self.block_size, pieces[block.stream + 1]))
        shards, ends = self._line(block.epoch)
        at = np.searchsorted(ends, in_line, side="right")
        shuffle = generator(self.seed, Draw.BLOCK_ORDER, *block).permutation(len(in_line))
        return shards[at], in_line - (ends[at] - self.counts[shards[at]]), shuffle

    def visit(self, epoch: int, shard: int, row: int) -> int:
        """The key of all draws for a sample in an epoch: epoch x rows of all tars + the sample's index among these.

        row: in the tar. So a sample has the same draws of an epoch whatever else is chosen.
        """
        return epoch * int(self._first_row[-1]) + int(self._first_row[shard]) + row

    def _dealt_to(self, stream: Ints, position: Ints) -> Ints:
        """How many of the positions before this one go to a stream."""
        # Only operators that work for int and arrays alike: NumPy's functions take ten times as long for one number.
        step, slot = divmod(position, self.global_batch)
        cycles, phase = divmod(step, self.phases)
        its_phase, piece = divmod(stream, self.streams)
        first, end = -(-piece * self.global_batch // self.streams), -(-(piece + 1) * self.global_batch // self.streams)
        in_this_step = (slot > first) * (slot - first) - (slot > end) * (slot - end)
        return (cycles + (its_phase < phase)) * (end - first) + (its_phase == phase) * in_this_step

    def _compute_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch's line, and the index in the line where each of them ends."""
        shards = generator(self.seed, Draw.SHARD_ORDER, epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _compute_pieces(self, epoch: int) -> np.ndarray:
        """The index in the epoch's line where the piece of each stream begins, and the end of the last."""
        every = np.arange(self.streams * self.phases)
        start, end = (np.full_like(every, e * self.samples) for e in (epoch, epoch + 1))
        dealt = self._dealt_to(every, end) - self._dealt_to(every, start)
        return np.concatenate([[0], np.cumsum(dealt)])
