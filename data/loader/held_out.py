"""Held-out samples in micro batches: the same at every call, and the same micro batches on any number of ranks."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.config import DataConfig
from data.loader.batch import Batch
from data.loader.cursor import RawSample, ShardCursor
from data.loader.dataset import Dataset
from data.loader.stream import Collator
from data.text.meta import TextMeta

logger = logging.getLogger(__name__)

# A rank's part is kept in memory if it takes no more, else it is read anew each time.
KEEP_BYTES = 2**28


class HeldOut:
    """A rank's part of `samples` samples, taken evenly from the datasets: central crops, no caption dropped.

    Every rank has equally many micro batches, the last ones filled up with what has weight 0 and is not counted as bad.
    A batch's visit is the sample's index among all in the datasets, -1 where it is filled up.
    config: of the training, whose limits and unreadable_shard hold here too.  low_res_size: as for Collator.
    """

    def __init__(
        self, config: DataConfig, datasets: list[Dataset], meta: TextMeta, *, image_size: int, samples: int,
        micro_batch: int, rank: int = 0, ranks: int = 1, low_res_size: int = 0,
    ) -> None:  # fmt: skip
        self._unreadable, self._told = config.unreadable_shard, False
        central = replace(config, crop_shift=0.0, cond_drop_prob=0.0)
        self._collator = Collator(central, datasets, meta, image_size, seed=0, low_res_size=low_res_size)
        self._ends = np.cumsum([count for dataset in datasets for count in dataset.counts])
        self._shards = [(dataset, shard) for dataset in datasets for shard in range(len(dataset.shards))]
        total = int(self._ends[-1])
        self.samples = min(samples, total)
        # Neighbours go to different ranks a micro batch at a time, so that a rank reads forwards.
        rounds = micro_batches(self.samples, micro_batch, ranks)
        visits = np.full(rounds * ranks * micro_batch, -1)
        visits[: self.samples] = np.arange(self.samples) * total // self.samples
        self._visits = visits.reshape(rounds, ranks, micro_batch)[:, rank]
        self._buffer = self._collator.new_buffer(micro_batch)
        kept = [self._buffer.pixels, self._buffer.text_emb, self._buffer.low_res]
        self._keeps = len(self._visits) * sum(t.nbytes for t in kept if t is not None) <= KEEP_BYTES
        self._kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self._visits)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept:
            yield from self._kept
            return
        raw, kept = self._read(), []
        for visits in self._visits:
            self._collator.collate([next(raw) for _ in visits], self._buffer)
            batch = self._buffer.copy(pin_memory=False)
            batch.bad = [(name, reason) for name, reason in batch.bad if name]
            self._tell(batch.bad)
            kept.append(batch) if self._keeps else None
            yield batch
        # What could not be read may be there the next time.
        if self._keeps and not any(batch.bad for batch in kept):
            self._kept = kept

    def _read(self) -> Iterator[tuple[int, RawSample]]:
        number, cursor = -1, None
        for visit in self._visits.flatten().tolist():
            if visit < 0:
                yield visit, RawSample("", problem="filled up")
                continue
            wanted = int(np.searchsorted(self._ends, visit, side="right"))
            dataset, shard = self._shards[wanted]
            if cursor is None or wanted != number:
                if cursor is not None:
                    cursor.close()
                online = dataset.encoder is not None
                text = "" if online else dataset.text
                number, cursor = (
                    wanted,
                    ShardCursor(dataset.shards[shard], text, self._unreadable, online, dataset.captions),
                )
                rows = dataset.rows(shard)
            yield visit, cursor.read(int(rows[visit - int(self._ends[number]) + len(rows)]))
        if cursor is not None:
            cursor.close()

    def _tell(self, bad: list[tuple[str, str]]) -> None:
        """Tell of the first bad sample; all are counted."""
        if bad and not self._told:
            name, reason = bad[0]
            logger.warning("%s is left out of the validation loss, as all that cannot be read: %s", name, reason[:200])
            self._told = True


def micro_batches(samples: int, micro_batch: int, ranks: int) -> int:
    """Micro batches of each rank."""
    return -(-samples // (micro_batch * ranks))
