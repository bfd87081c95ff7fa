"""A dataset: its shards, its embeddings, its share of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from data.config import CaptionConfig, DataConfig
from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.machine import raise_if_machine
from data.storage.shards import Shard, find_shards
from data.storage.tars import Sample, read_shard

if TYPE_CHECKING:  # its import takes seconds, and only text.mode=online needs it
    from data.text.encoder import TextEncoder

# Where a caption field is looked for: in the first samples of some shards.
SHARDS_LOOKED_AT, SAMPLES_OF_EACH = 10, 100


@dataclass(slots=True)
class Dataset:
    """The shards of a dataset and the folder of their embeddings.

    weight: the dataset's share of every batch, in any unit.
    encoder: makes the embeddings from the captions, if they are not to be read from the folder.
    captions: the captions of a sample, of which one is drawn.
    """

    shards: list[Shard]
    text: str
    weight: float = 1.0
    encoder: "TextEncoder | None" = None
    captions: list[CaptionConfig] = field(default_factory=lambda: [CaptionConfig()])

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [shard.count for shard in self.shards]

    def rows(self, shard: int) -> np.ndarray:
        """The rows in its tar of a shard's samples, ascending."""
        return np.arange(self.shards[shard].count)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)

    @property
    def fields(self) -> list[str]:
        """The fields of the captions, in their order."""
        return [caption.field for caption in self.captions]


def find_datasets(config: DataConfig) -> list[Dataset]:
    """The datasets of a config, with their shards. Raises: ValueError if one has no shards."""
    return [
        Dataset(find_shards(dataset.shards), dataset.text, dataset.weight, captions=config.captions)
        for dataset in config.datasets()
    ]


def check_captions(datasets: list[Dataset]) -> None:
    """Make sure that each caption field but txt names a caption: some samples of a dataset are looked at.

    Raises: ValueError if none of them has one.
    """
    for name in datasets[0].fields:
        samples = (sample for dataset in datasets for sample in _first_samples(dataset.shards, name))
        looked_at, found = 0, name == TXT
        while not found and (sample := next(samples, None)) is not None:
            looked_at, found = looked_at + 1, bool(find_captions(sample[1], [name]))
        if looked_at and not found:
            raise ValueError(
                f"data.captions: none of {looked_at} samples that were looked at has a caption {name}, which would be "
                f"KEY.{name}.txt, KEY.{name} or the entry {name} of KEY.json: is the name right?"
            )


def _first_samples(shards: list[Shard], name: str) -> Iterator[Sample]:
    """The first samples of some shards, evenly taken, with the files that may hold a caption; as far as readable."""
    for number in sorted({i * len(shards) // SHARDS_LOOKED_AT for i in range(SHARDS_LOOKED_AT)}):
        try:
            yield from islice(read_shard(shards[number].location, caption_extensions([name])), SAMPLES_OF_EACH)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                raise_if_machine(error, shards[number].location)
