"""Shards to micro batches, in the order of data/loader/order.py."""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from data.config import DataConfig
from data.images import BadImage, preprocess
from data.loader.batch import Batch
from data.loader.cursor import TEXT_UNREADABLE, RawSample, ShardCursor, ShardUnreadable
from data.loader.dataset import Dataset
from data.loader.draws import Draw, Draws
from data.loader.mixture import Mixture
from data.loader.order import Block
from data.loader.workers import Workers
from data.text.embeddings import read_empty, read_into
from data.text.meta import TextMeta

logger = logging.getLogger(__name__)


class BlockReader:
    """Holds the block that a stream stands in, and the shard that it was read from, so that it can be read on."""

    def __init__(self, order: Mixture, number: int, dataset: Dataset, unreadable: str) -> None:
        self.order, self.number, self.dataset, self.unreadable = order, number, dataset, unreadable
        self._block: Block | None = None
        self._samples: list[tuple[int, RawSample]] = []
        self._cursor: ShardCursor | None = None

    def sample(self, block: Block, within: int) -> tuple[int, RawSample]:
        """visit and bytes of the sample at a number of the block's shuffled order."""
        if block != self._block:
            self._samples = []  # not to hold two blocks at once
            shard, row, shuffle = self.order.orders[self.number].rows(block)
            self._samples = [
                (self.order.visit(self.number, block.epoch, s, r), self._read(s, r))
                for s, r in zip(shard.tolist(), row.tolist(), strict=True)
            ]
            self._block, self._shuffle = block, shuffle.tolist()
        return self._samples[self._shuffle[within]]

    def _read(self, shard: int, row: int) -> RawSample:
        cursor, wanted = self._cursor, self.dataset.shards[shard]
        if cursor is None or cursor.shard is not wanted or cursor.row > row:
            if cursor is not None:
                cursor.close()
            online = self.dataset.encoder is not None
            cursor = self._cursor = ShardCursor(wanted, "" if online else self.dataset.text, self.unreadable, online)
        return cursor.read(row)


class MicroBatches:
    """The micro batches of one rank from a step on, without end.

    A step's global batch is cut into one run of slots a rank, and a rank's run into its micro batches, which are
    numbered from the first of step 0 on. Of W loader workers each makes every W-th.
    """

    def __init__(
        self, config: DataConfig, datasets: list[Dataset], meta: TextMeta, image_size: int, seed: int,
        global_batch: int, micro_batch: int, rank: int, ranks: int, step: int,
    ) -> None:  # fmt: skip
        c = self.config = config
        self.datasets, self.meta, self.image_size = datasets, meta, image_size
        self.crops, self.dropouts = Draws(seed, Draw.CROP), Draws(seed, Draw.DROPOUT)
        counts, weights = [[shard.count for shard in d.shards] for d in datasets], [d.weight for d in datasets]
        self.order = Mixture(seed, counts, weights, global_batch, c.streams, c.phases, c.shuffle_block)
        self.micro_batch, self.first_slot = micro_batch, rank * (global_batch // ranks)
        self.micro_batches = global_batch // (ranks * micro_batch)
        self.first = step * self.micro_batches
        self.encoder = datasets[0].encoder
        self.empty = self.encoder.token_ids([""])[0] if self.encoder else read_empty(datasets[0].text, meta)

    def place(self) -> Batch:
        """Shared memory for one micro batch."""
        return Batch.shared(self.micro_batch, self.image_size, self.empty.shape, getattr(torch, self.empty.dtype.name))

    def fill(self, first: int, stride: int, places: list[Batch]) -> Iterator[Batch]:
        """The micro batches numbered first, first + stride, ..., written to the places in turn, over and over."""
        readers: dict[tuple[int, int], BlockReader] = {}
        for number, place in zip(itertools.count(first, stride), itertools.cycle(places)):
            samples = []
            for dataset, block, within in self.positions(number):
                reader = readers.get((dataset, block.stream))
                if reader is None:
                    reader = BlockReader(self.order, dataset, self.datasets[dataset], self.config.unreadable_shard)
                    readers[dataset, block.stream] = reader
                samples.append(reader.sample(block, within))
            self._collate(samples, place)
            yield place

    def positions(self, number: int) -> list[tuple[int, Block, int]]:
        """Dataset, block and number in its shuffled order of each sample of a micro batch."""
        step, micro = divmod(number, self.micro_batches)
        first = self.first_slot + micro * self.micro_batch
        return [self.order.locate(step, slot) for slot in range(first, first + self.micro_batch)]

    def describe(self, number: int) -> str:
        """The step of a micro batch and the shards that its blocks lie in."""
        found = set()
        for dataset, block in {(dataset, block) for dataset, block, _ in self.positions(number)}:
            shards = self.order.orders[dataset].rows(block)[0]
            found |= {self.datasets[dataset].shards[shard].name for shard in shards.tolist()}
        return f"step {number // self.micro_batches + 1}, {', '.join(sorted(found)[:8])}"

    def key(self, number: int, i: int) -> str:
        """The name of the i-th sample of a micro batch, read from its shard once more."""
        dataset, block, within = self.positions(number)[i]
        shards, rows, shuffle = self.order.orders[dataset].rows(block)
        place = shuffle[within]
        return ShardCursor(self.datasets[dataset].shards[shards[place]], "").read(int(rows[place])).name

    def _collate(self, samples: list[tuple[int, RawSample]], batch: Batch) -> None:
        c = self.config
        pixels, text_emb, weight = batch.pixels.numpy(), batch.text_emb.numpy(), batch.weight.numpy()
        weight[:], batch.bad = 1.0, []
        for i, (visit, raw) in enumerate(samples):
            try:
                if raw.problem:
                    raise BadImage(raw.problem)
                pixels[i] = preprocess(raw.image, self.image_size, c.crop_shift, self.crops.at(visit), c.images)
                if self.dropouts.at(visit).random() < c.cond_drop_prob:
                    text_emb[i] = self.empty
                else:
                    self._read_text(text_emb[i], raw)
            except ValueError as problem:
                pixels[i], text_emb[i], weight[i] = 0, self.empty, 0.0
                batch.bad.append((raw.name, str(problem)))
        batch.visit.numpy()[:] = [visit for visit, _ in samples]

    def _read_text(self, out: np.ndarray, raw: RawSample) -> None:
        """Raises: ValueError, the reason why there is none; ShardUnreadable if the run is not to go on without."""
        if self.encoder:
            out[:] = self.encoder.token_ids([raw.caption.decode("utf-8", "replace")])[0]
            return
        try:
            read_into(out, raw.embedding, self.meta)
        except OSError as error:
            told = f"the embedding of {raw.name} cannot be read: {error}"
            if self.config.unreadable_shard == "fail":
                raise ShardUnreadable(f"{told}; mend it, or set data.unreadable_shard=skip") from None
            logger.warning(told)
            raise ValueError(TEXT_UNREADABLE) from None


def micro_batches(stream: MicroBatches, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The micro batches in order, made by worker processes, or in this one by none; see data.workers.Workers."""
    if workers:
        return Workers(stream.fill, stream.place, stream.describe, stream.first, workers, pin_memory)
    return (batch.copy(pin_memory) for batch in stream.fill(stream.first, 1, [stream.place()]))
