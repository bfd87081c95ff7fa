"""Shards to micro batches, in the order of data/order.py."""

import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.batch import Batch
from data.draws import Draw, generator
from data.order import Block, Order
from data.shards import Shard
from data.tars import read_shard
from data.text import TextMeta, from_bytes, read_empty, sidecar
from data.transforms import BadImage, preprocess

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


@dataclass(slots=True)
class DataConfig:
    """Where the samples lie and how they are read; see docs/data.md.

    shards, text: folders of image shards and of their embeddings.  tokens: length of an embedding.
    crop_shift: largest shift of the crop from the centre, as a share of its side.
    cond_drop_prob: share of captions replaced by the empty one.
    streams, phases, shuffle_block: see data.order.Order.  workers: loader processes per rank, 0 reads in the trainer.
    max_bad_share: the run stops when more of the samples than this cannot be read.
    """

    shards: str = "shards"
    text: str = "text"
    tokens: int = 77
    crop_shift: float = 0.1
    cond_drop_prob: float = 0.1
    streams: int = 8
    phases: int = 2
    shuffle_block: int = 256
    workers: int = 1
    max_bad_share: float = 0.05


@dataclass(slots=True)
class RawSample:
    """The bytes of one sample, or why there are none."""

    name: str
    image: bytes = b""
    embedding: bytes = b""
    caption: bytes = b""
    problem: str = ""


class ShardCursor:
    """Reads a shard and its sidecar side by side, forwards."""

    def __init__(self, shard: Shard, text_folder: str) -> None:
        self.shard, self.row = shard, 0
        self._images = _until_damaged(shard.path, {*IMAGE_EXTENSIONS, "txt"})
        self._texts = _until_damaged(sidecar(shard, text_folder), {"npy"})
        self._text = next(self._texts, None)

    def read(self, row: int) -> RawSample:
        """The sample at a row that is not behind the cursor."""
        while self.row <= row:
            sample = self._next()
        return sample

    def _next(self) -> RawSample:
        self.row += 1
        found = next(self._images, None)
        if found is None:
            return RawSample(f"{self.shard.path.name}[{self.row - 1}]", problem="shard ended early")
        key, members = found
        name = f"{self.shard.path.name}:{key}"
        # The sidecar has the same keys in the same order, less those that had no caption.
        embedding = b""
        if self._text is not None and self._text[0] == key:
            embedding = self._text[1].get("npy", b"")
            self._text = next(self._texts, None)
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), b"")
        problem = "no image" if not image else "no embedding" if not embedding else ""
        return RawSample(name, image, embedding, members.get("txt", b""), problem)


def _until_damaged(path: Path, extensions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar up to where it can no longer be read, which is logged."""
    try:
        yield from read_shard(path, extensions)
    except (OSError, tarfile.TarError, ValueError) as error:
        logger.warning("%s cannot be read any further: %s", path, str(error).splitlines()[0])


class BlockReader:
    """Holds the block that a stream stands in, and the shard that it was read from, so that it can be read on."""

    def __init__(self, order: Order, shards: list[Shard], text_folder: str) -> None:
        self.order, self.shards, self.text_folder = order, shards, text_folder
        self._block: Block | None = None
        self._cursor: ShardCursor | None = None

    def sample(self, block: Block, within: int) -> tuple[int, RawSample]:
        """visit and bytes of the sample at a number of the block's shuffled order."""
        if block != self._block:
            shard, row, self._shuffle = self.order.rows(block)
            self._samples = [
                (self.order.visit(block.epoch, s, r), self._read(s, r))
                for s, r in zip(shard.tolist(), row.tolist(), strict=True)
            ]
            self._block = block
        return self._samples[self._shuffle[within]]

    def _read(self, shard: int, row: int) -> RawSample:
        cursor = self._cursor
        if cursor is None or cursor.shard is not self.shards[shard] or cursor.row > row:
            cursor = self._cursor = ShardCursor(self.shards[shard], self.text_folder)
        return cursor.read(row)


class MicroBatches(IterableDataset):
    """The micro batches of one rank from a step on, without end.

    A step's global batch is cut into one run of slots a rank, and a rank's run into its micro batches. Loader worker w
    of W makes the micro batches w, w + W, ...; DataLoader hands them out in that order.
    """

    def __init__(
        self, config: DataConfig, shards: list[Shard], meta: TextMeta, image_size: int, seed: int, global_batch: int,
        micro_batch: int, rank: int, ranks: int, step: int,
    ) -> None:  # fmt: skip
        self.config, self.shards, self.meta, self.image_size, self.seed = config, shards, meta, image_size, seed
        self.global_batch, self.micro_batch, self.step = global_batch, micro_batch, step
        self.first_slot, self.micro_batches = rank * (global_batch // ranks), global_batch // (ranks * micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        c = self.config
        counts = [shard.count for shard in self.shards]
        order = Order(self.seed, counts, self.global_batch, c.streams, c.phases, c.shuffle_block)
        empty = read_empty(c.text, self.meta)
        readers: dict[int, BlockReader] = {}
        unit = self.step * self.micro_batches + number
        while True:
            step, micro = divmod(unit, self.micro_batches)
            first = self.first_slot + micro * self.micro_batch
            samples = []
            for slot in range(first, first + self.micro_batch):
                block, within = order.locate(step, slot)
                reader = readers.setdefault(block.stream, BlockReader(order, self.shards, c.text))
                samples.append(reader.sample(block, within))
            yield self._collate(samples, empty)
            unit += workers

    def _collate(self, samples: list[tuple[int, RawSample]], empty: np.ndarray) -> Batch:
        n, c = len(samples), self.config
        pixels = np.zeros((n, 3, self.image_size, self.image_size), dtype=np.uint8)
        text_emb = np.empty((n, *empty.shape), dtype=empty.dtype)
        weight = np.ones(n, dtype=np.float32)
        bad = []
        for i, (visit, raw) in enumerate(samples):
            try:
                if raw.problem:
                    raise BadImage(raw.problem)
                crop = generator(self.seed, Draw.CROP, visit)
                pixels[i] = preprocess(raw.image, self.image_size, c.crop_shift, crop)
                drop = generator(self.seed, Draw.DROPOUT, visit).random() < c.cond_drop_prob
                text_emb[i] = empty if drop else from_bytes(raw.embedding, self.meta)
            except ValueError as problem:
                pixels[i], text_emb[i], weight[i] = 0, empty, 0.0
                bad.append((raw.name, str(problem)))
        visits = torch.tensor([visit for visit, _ in samples], dtype=torch.int64)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(text_emb), visits, torch.from_numpy(weight), bad)


def micro_batches(dataset: MicroBatches, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The dataset through DataLoader's worker processes, in order."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin_memory))


def stored_prompts(shards: list[Shard], text_folder: str, meta: TextMeta, n: int) -> list[tuple[str, np.ndarray]]:
    """At most n captions, taken evenly from the shards, with their embeddings [tokens, dim]: no encoder is needed.

    Raises: ValueError if none of the samples looked at can be read.
    """
    ends = np.cumsum([shard.count for shard in shards])
    prompts = []
    for place in np.unique(np.arange(n) * int(ends[-1]) // n).tolist():
        at = int(np.searchsorted(ends, place, side="right"))
        raw = ShardCursor(shards[at], text_folder).read(place - int(ends[at]) + shards[at].count)
        try:
            prompts.append((raw.caption.decode("utf-8", "replace"), from_bytes(raw.embedding, meta)))
        except ValueError as problem:
            logger.warning("%s cannot serve as a prompt: %s", raw.name, raw.problem or problem)
    if not prompts:
        raise ValueError(
            f"none of {n} samples, taken evenly from {len(shards)} shards, can be read: look at the shards"
        )
    return prompts
