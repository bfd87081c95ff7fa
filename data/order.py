"""In what order the samples come: a pure function of the seed, the counts and the position.

Position g = step x global batch + slot; an epoch is N successive positions, N the number of samples. Positions are
dealt to virtual streams: slot i of a step goes to stream i x streams // global_batch of that step's phase, which is
step % phases. For each epoch the shards are permuted and laid end to end in one line; each stream gets the next piece
of the line, as long as the number of its positions in that epoch, reads it in blocks and permutes each block. So every
sample comes once an epoch, the order knows nothing of ranks or workers, and to resume is to name a step. (What
mosaicml/streaming calls elastic determinism, for plain tars.)
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.draws import Draw, generator


class Block(NamedTuple):
    """A run of samples that one stream reads and shuffles together, in the order in which they lie in the line."""

    epoch: int
    stream: int
    number: int


class Order:
    """The order of samples of one run.

    counts: samples per shard.  streams: pieces of one batch, at most global_batch; with a multiple of the ranks, no
    shard is read by two of them.  phases: successive steps take turns among so many sets of streams, so that as many
    workers can read side by side.  block_size: samples shuffled together.
    Raises: ValueError.
    """

    def __init__(
        self, seed: int, counts: list[int], global_batch: int, streams: int, phases: int, block_size: int
    ) -> None:
        if not 1 <= streams <= global_batch:
            raise ValueError(f"data.streams={streams} must lie between 1 and global_batch={global_batch}")
        if phases < 1 or block_size < 1:
            raise ValueError(f"data.phases={phases} and data.shuffle_block={block_size} must be at least 1")
        self.seed, self.global_batch, self.block_size = seed, global_batch, block_size
        self.streams, self.phases = streams, phases
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first_index = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.first_index[-1])
        edges = -(-np.arange(streams + 1) * global_batch // streams)
        self._phase = np.repeat(np.arange(phases), streams)
        self._first_slot, self._slots = np.tile(edges[:-1], phases), np.tile(np.diff(edges), phases)
        self._line = lru_cache(maxsize=2)(self._compute_line)
        self._pieces = lru_cache(maxsize=2)(self._compute_pieces)

    def locate(self, step: int, slot: int) -> tuple[Block, int]:
        """The block that holds the sample of a position, and the sample's number in the block's shuffled order."""
        position = step * self.global_batch + slot
        epoch = position // self.samples
        stream = step % self.phases * self.streams + slot * self.streams // self.global_batch
        index = int(self._dealt_to(stream, position) - self._dealt_to(stream, epoch * self.samples))
        number, within = divmod(index, self.block_size)
        return Block(epoch, stream, number), within

    def rows(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """shard [n] and row [n] of a block's samples as they lie in the line, and the shuffle [n] of those n."""
        pieces = self._pieces(block.epoch)
        first = pieces[block.stream] + block.number * self.block_size
        places = np.arange(first, min(first + self.block_size, pieces[block.stream + 1]))
        shards, ends = self._line(block.epoch)
        at = np.searchsorted(ends, places, side="right")
        shuffle = generator(self.seed, Draw.BLOCK_ORDER, *block).permutation(len(places))
        return shards[at], places - (ends[at] - self.counts[shards[at]]), shuffle

    def visit(self, epoch: int, shard: int, row: int) -> int:
        """The key of all draws for a sample in an epoch: epoch x samples + the sample's index in the dataset."""
        return epoch * self.samples + int(self.first_index[shard]) + row

    def _dealt_to(self, stream: int | np.ndarray, position: int) -> np.ndarray:
        """How many of the positions below this one went to a stream."""
        step, slot = divmod(position, self.global_batch)
        cycles, phase = divmod(step, self.phases)
        slots, its_phase = self._slots[stream], self._phase[stream]
        in_this_step = np.clip(slot - self._first_slot[stream], 0, slots)
        in_this_cycle = np.where(its_phase < phase, slots, np.where(its_phase == phase, in_this_step, 0))
        return cycles * slots + in_this_cycle

    def _compute_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards as an epoch lays them end to end, and where each of them ends."""
        shards = generator(self.seed, Draw.SHARD_ORDER, epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _compute_pieces(self, epoch: int) -> np.ndarray:
        """Where in the epoch's line the piece of each stream begins, and the end of the last."""
        every = np.arange(self.streams * self.phases)
        dealt = self._dealt_to(every, (epoch + 1) * self.samples) - self._dealt_to(every, epoch * self.samples)
        return np.concatenate([[0], np.cumsum(dealt)])
