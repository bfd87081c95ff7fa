"""A dataset: its shards, its embeddings, its share of every batch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.config import CaptionConfig, DataConfig
from data.storage.shards import Shard, find_shards

if TYPE_CHECKING:  # its import takes seconds, and only text.mode=online needs it
    from data.text.encoder import TextEncoder


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
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.count for shard in self.shards)

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
