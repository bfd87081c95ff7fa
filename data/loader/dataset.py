"""A dataset as it was found: its shards, its embeddings, its share of every batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.config import DataConfig
from data.storage.shards import Shard, find_shards

if TYPE_CHECKING:  # it takes seconds to import, and only text.mode=online has need of it
    from data.text.encoder import TextEncoder


@dataclass(slots=True)
class Dataset:
    """Shards that were found, where their embeddings lie, and the share of every batch, in any unit.

    encoder: what makes the embeddings from the captions, where they are not stored.
    """

    shards: list[Shard]
    text: str
    weight: float = 1.0
    encoder: "TextEncoder | None" = None

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.count for shard in self.shards)


def find_datasets(config: DataConfig) -> list[Dataset]:
    """The shards of each dataset. Raises: ValueError if there are none."""
    return [Dataset(find_shards(told.shards), told.text, told.weight) for told in config.datasets()]
