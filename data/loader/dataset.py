"""A dataset: its shards, its embeddings, its share of every batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.config import DataConfig
from data.storage.shards import Shard, find_shards

if TYPE_CHECKING:  # its import takes seconds, and only text.mode=online needs it
    from data.text.encoder import TextEncoder


@dataclass(slots=True)
class Dataset:
    """The shards of a dataset and the folder of their embeddings.

    weight: the dataset's share of every batch, in any unit.
    encoder: makes the embeddings from the captions, if they are not to be read from the folder.
    """

    shards: list[Shard]
    text: str
    weight: float = 1.0
    encoder: "TextEncoder | None" = None

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


def find_datasets(config: DataConfig) -> list[Dataset]:
    """The datasets of a config, with their shards. Raises: ValueError if one has no shards."""
    return [Dataset(find_shards(dataset.shards), dataset.text, dataset.weight) for dataset in config.datasets()]
