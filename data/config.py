"""What a run is told of its data."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.shards import Shard, find_shards
from data.transforms import ImageRules

if TYPE_CHECKING:  # it takes seconds to import, and only text.mode=online has need of it
    from data.encoder import TextEncoder


@dataclass(slots=True)
class DatasetConfig:
    """One dataset of a mixture.  weight: its share of every batch, in any unit."""

    shards: str
    text: str
    weight: float = 1.0


@dataclass(slots=True)
class TextConfig:
    """Where text embeddings come from.

    mode: 'stored' reads them from data.text; 'online' runs the frozen encoder that its meta file names on every rank.
    encoder: where that lies now, if not where the meta file says.
    """

    mode: str = "stored"
    encoder: str = ""


@dataclass(slots=True)
class DataConfig:
    """Where the samples lie and how they are read; see docs/data.md.

    shards, text: image shards and their embeddings, as docs/sources.md has it.  mixture: several such pairs by name, in
    place of shards and text.  tokens: length of an embedding.
    crop_shift: largest shift of the crop from the centre, as a share of its side.
    cond_drop_prob: share of captions replaced by the empty one.
    streams, phases, shuffle_block: see data.order.Order.  workers: loader processes per rank, 0 reads in the trainer.
    images: what is decoded.  max_bad_share: the run stops when more of the samples than this cannot be used.
    unreadable_shard: 'skip' makes bad samples of what cannot be read, 'fail' ends the run.
    """

    shards: str = "shards"
    text: str = "text"
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    tokens: int = 77
    crop_shift: float = 0.1
    cond_drop_prob: float = 0.1
    streams: int = 8
    phases: int = 2
    shuffle_block: int = 256
    workers: int = 1
    images: ImageRules = field(default_factory=ImageRules)
    max_bad_share: float = 0.05
    unreadable_shard: str = "skip"

    def datasets(self) -> list[DatasetConfig]:
        """Those of the mixture, or the one."""
        return list(self.mixture.values()) or [DatasetConfig(self.shards, self.text)]


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
