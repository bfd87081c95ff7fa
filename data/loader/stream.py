"""From shards to micro batches, in the order of data/loader/order.py."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch

from data.config import DataConfig
from data.images import BadImage, crop, decode, resize
from data.loader.batch import Batch
from data.loader.cursor import TEXT_UNREADABLE, RawSample, ShardCursor, ShardUnreadable
from data.loader.dataset import Dataset
from data.loader.draws import Draw, Draws
from data.loader.mixture import Mixture
from data.loader.order import Block
from data.loader.workers import HANG_SECONDS, Workers
from data.storage.machine import raise_if_machine
from data.text.decode import decode_caption
from data.text.embeddings import loaded_array, read_empty, read_into
from data.text.lowrank_factors import empty_factors
from data.text.meta import LOWRANK, TextMeta

logger = logging.getLogger(__name__)


class BlockReader:
    """Reads the blocks of one virtual stream. It holds the current block, and the shard at which reading continues.

    number: of the dataset in the mixture.  unreadable: as for ShardCursor.
    choices: the draws of the captions, None where there is one caption.
    """

    def __init__(
        self, mixture: Mixture, number: int, dataset: Dataset, unreadable: str, choices: Draws | None
    ) -> None:  # fmt: skip
        self.mixture, self.number, self.dataset, self.unreadable = mixture, number, dataset, unreadable
        self.choices = choices
        self._block: Block | None = None
        self._samples: list[tuple[int, RawSample]] = []
        self._cursor: ShardCursor | None = None
        self._rows_of = lru_cache(maxsize=2)(dataset.rows)  # most blocks go on in the shard of the one before

    def sample(self, block: Block, within: int) -> tuple[int, RawSample]:
        """visit and bytes of the sample at an index of the block's shuffled order."""
        if block != self._block:
            self._samples = []  # frees the last block before the next is read
            shard, number, shuffle = self.mixture.orders[self.number].rows(block)
            for s, n in zip(shard.tolist(), number.tolist(), strict=True):
                row = int(self._rows_of(s)[n])
                self._samples.append(self._read(self.mixture.visit(self.number, block.epoch, s, row), s, row))
            self._block, self._shuffle = block, shuffle.tolist()
        return self._samples[self._shuffle[within]]

    def _read(self, visit: int, shard: int, row: int) -> tuple[int, RawSample]:
        cursor, wanted = self._cursor, self.dataset.shards[shard]
        if cursor is None or cursor.shard is not wanted or cursor.row > row:
            if cursor is not None:
                cursor.close()
            online = self.dataset.encoder is not None
            folder, captions = "" if online else self.dataset.text, self.dataset.captions
            cursor = self._cursor = ShardCursor(wanted, folder, self.unreadable, online, captions)
        return visit, cursor.read(row, self.choices.at(visit).random() if self.choices else 0.0)


class MicroBatches:
    """The micro batches of one rank from a step on, without end.

    The slots of a global batch are divided among the ranks, one run each, and a rank's run into its micro batches. They
    are numbered from the first micro batch of step 0 on. Of W loader workers each makes every W-th.

    global_batch, micro_batch: in samples; global_batch is a multiple of ranks x micro_batch.
    step: the number of steps done before.  left_out: global batches of the order that no step takes.
    low_res_size: as for Collator.
    """

    def __init__(
        self, config: DataConfig, datasets: list[Dataset], meta: TextMeta, *, image_size: int, seed: int,
        global_batch: int, micro_batch: int, rank: int = 0, ranks: int = 1, step: int = 0,
        left_out: Iterable[int] = (), low_res_size: int = 0,
    ) -> None:  # fmt: skip
        c = self.config = config
        self.datasets, self.collator = datasets, Collator(config, datasets, meta, image_size, seed, low_res_size)
        self.choices = Draws(seed, Draw.CAPTION) if len(datasets[0].captions) > 1 else None
        counts, weights = [d.counts for d in datasets], [d.weight for d in datasets]
        stored = [[shard.count for shard in d.shards] for d in datasets]
        self.mixture = Mixture(seed, counts, weights, global_batch, c.streams, c.phases, c.shuffle_block, stored)
        self.micro_batch, self.first_slot = micro_batch, rank * (global_batch // ranks)
        self.micro_batches = global_batch // (ranks * micro_batch)
        self.first, self._left_out = step * self.micro_batches, sorted(set(left_out))

    def new_buffer(self) -> Batch:
        """A micro batch of zeros in shared memory."""
        return self.collator.new_buffer(self.micro_batch)

    def fill(self, first: int, stride: int, buffers: list[Batch]) -> Iterator[Batch]:
        """The micro batches numbered first, first + stride, ..., written to the buffers in turn, over and over."""
        readers: dict[tuple[int, int], BlockReader] = {}
        for number, buffer in zip(itertools.count(first, stride), itertools.cycle(buffers)):
            samples = []
            for dataset, block, within in self.positions(number):
                reader = readers.get((dataset, block.stream))
                if reader is None:
                    reader = readers[dataset, block.stream] = BlockReader(
                        self.mixture, dataset, self.datasets[dataset], self.config.unreadable_shard, self.choices
                    )
                samples.append(reader.sample(block, within))
            self.collator.collate(samples, buffer)
            yield buffer

    def positions(self, number: int) -> list[tuple[int, Block, int]]:
        """The dataset, the block and the index in its shuffled order of each sample of a micro batch."""
        batch, micro = self.batch_of(number), number % self.micro_batches
        first = self.first_slot + micro * self.micro_batch
        return [self.mixture.locate(batch, slot) for slot in range(first, first + self.micro_batch)]

    def batch_of(self, number: int) -> int:
        """The global batch of the order that a micro batch is a part of: that of its step, later for each left out."""
        batch = number // self.micro_batches
        for left_out in self._left_out:
            batch += left_out <= batch
        return batch

    def describe(self, number: int) -> str:
        """The step of a micro batch and the shards that its samples come from, for a message."""
        names = set()
        for dataset, block in {(dataset, block) for dataset, block, _ in self.positions(number)}:
            shards = self.mixture.orders[dataset].rows(block)[0]
            names |= {self.datasets[dataset].shards[shard].name for shard in shards.tolist()}
        return f"step {number // self.micro_batches + 1}, {', '.join(sorted(names)[:8])}"

    def sample_name(self, number: int, i: int) -> str:
        """The name of the i-th sample of a micro batch. Its shard is read once more to find it."""
        dataset, block, within = self.positions(number)[i]
        shards, numbers, shuffle = self.mixture.orders[dataset].rows(block)
        shard, found = int(shards[shuffle[within]]), self.datasets[dataset]
        return ShardCursor(found.shards[shard], "").read(int(found.rows(shard)[numbers[shuffle[within]]])).name


class Collator:
    """Decodes, crops and, where it is drawn, drops the captions of the samples of a micro batch.

    low_res_size: side of the small images of the second stage; 0 makes none.
    """

    def __init__(
        self, config: DataConfig, datasets: list[Dataset], meta: TextMeta, image_size: int, seed: int,
        low_res_size: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.meta, self.image_size, self.low_res_size = config, meta, image_size, low_res_size
        self.crops, self.dropouts = Draws(seed, Draw.CROP), Draws(seed, Draw.DROPOUT)
        self.encoder = datasets[0].encoder
        if self.encoder:
            self.empty = self.encoder.token_ids([""])[0]
        elif meta.dtype == LOWRANK:
            self.empty = empty_factors()
            for dataset in datasets:  # each was measured on its own captions: makes its channels known to the workers
                TextMeta.read(dataset.text)
        else:
            self.empty = read_empty(datasets[0].text, meta)
        self.text_shape = self.empty.shape if self.encoder else loaded_array(meta).shape

    def new_buffer(self, micro_batch: int) -> Batch:
        """A micro batch of zeros in shared memory."""
        dtype = getattr(torch, self.empty.dtype.name)
        return Batch.shared(micro_batch, self.image_size, self.text_shape, dtype, self.low_res_size)

    def collate(self, samples: list[tuple[int, RawSample]], batch: Batch) -> None:
        """Write the samples, each with its visit, to the batch."""
        c = self.config
        pixels, text_emb, weight = batch.pixels.numpy(), batch.text_emb.numpy(), batch.weight.numpy()
        low_res = None if batch.low_res is None else batch.low_res.numpy()
        weight[:], batch.bad, lacks, enlarged = 1.0, [], 0, 0
        for i, (visit, raw) in enumerate(samples):
            try:
                if raw.problem:
                    raise BadImage(raw.problem)
                square = crop(decode(raw.image, c.images), c.crop_shift, self.crops.at(visit))
                pixels[i] = resize(square, self.image_size)
                if low_res is not None:
                    low_res[i] = resize(square, self.low_res_size)
                if self.dropouts.at(visit).random() < c.cond_drop_prob:
                    text_emb[i, : len(self.empty)] = self.empty
                else:
                    self._read_text(text_emb[i], raw)
                lacks, enlarged = lacks + raw.lacks, enlarged + (square.width < self.image_size)
            except ValueError as problem:
                pixels[i], text_emb[i, : len(self.empty)], weight[i] = 0, self.empty, 0.0
                if low_res is not None:
                    low_res[i] = 0
                batch.bad.append((raw.name, str(problem)))
        batch.visit.numpy()[:] = [visit for visit, _ in samples]
        batch.lacks.numpy()[0], batch.enlarged.numpy()[0] = lacks, enlarged

    def _read_text(self, out: np.ndarray, raw: RawSample) -> None:
        """Write the embedding or the token ids of a sample into out.

        Raises: ValueError, whose message is the reason for the count; ShardUnreadable; MachineError.
        """
        if self.encoder:
            out[:] = self.encoder.token_ids([decode_caption(raw.caption)])[0]
            return
        try:
            read_into(out, raw.embedding, self.meta)
        except OSError as error:
            raise_if_machine(error, f"the embedding of {raw.name}")
            problem = f"the embedding of {raw.name} cannot be read: {error}"
            if self.config.unreadable_shard == "fail":
                raise ShardUnreadable(f"{problem}; repair it, or set data.unreadable_shard=skip") from None
            logger.warning(problem)
            raise ValueError(TEXT_UNREADABLE) from None


def micro_batches(
    stream: MicroBatches, workers: int, pin_memory: bool, patience: float = HANG_SECONDS
) -> Iterator[Batch]:
    """The micro batches in order, made by worker processes (see Workers), or by this process if workers is 0.

    patience: seconds after which workers that have made no batch are taken to hang.
    """
    if workers:
        return Workers(stream.fill, stream.new_buffer, stream.describe, stream.first, workers, pin_memory, patience)
    return (batch.copy(pin_memory) for batch in stream.fill(stream.first, 1, [stream.new_buffer()]))
