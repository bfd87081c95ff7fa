"""A dataset: its shards and which of their samples are chosen, its embeddings, its share of every batch."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data.config import DataConfig
from data.selection.rules import Rules, selection_location
from data.selection.stored import CHOSEN, HELD, Selection, read_selection
from data.storage.shards import Shard, find_shards

if TYPE_CHECKING:  # its import takes seconds, and only text.mode=online needs it
    from data.text.encoder import TextEncoder


@dataclass(slots=True)
class Dataset:
    """The shards of a dataset and the folder of their embeddings.

    weight: the dataset's share of every batch, in any unit.
    encoder: makes the embeddings from the captions, if they are not to be read from the folder.
    selection: which samples are chosen; None for all.  held: the dataset is of those that are held apart instead.
    """

    shards: list[Shard]
    text: str
    weight: float = 1.0
    encoder: "TextEncoder | None" = None
    selection: Selection | None = None
    held: bool = False

    @property
    def counts(self) -> list[int]:
        """Chosen samples of each shard."""
        if self.selection is None:
            return [shard.count for shard in self.shards]
        return self.selection.counts[:, HELD if self.held else CHOSEN].tolist()

    def rows(self, shard: int) -> np.ndarray:
        """The rows in its tar of a shard's chosen samples, ascending.

        Raises: SelectionChanged; OSError.
        """
        if self.selection is None:
            return np.arange(self.shards[shard].count)
        return self.selection.rows(shard, HELD if self.held else CHOSEN)

    @property
    def samples(self) -> int:
        """Chosen samples in all shards."""
        return sum(self.counts)


def find_datasets(config: DataConfig) -> list[Dataset]:
    """The datasets of a config, with their shards and selections.

    Raises: ValueError if one has no shards, or rules without a selection by them that fits the shards; OSError.
    """
    datasets = []
    for given in config.datasets():
        dataset = Dataset(find_shards(given.shards), given.text, given.weight)
        if rules := Rules(given.where, tuple(given.drop), config.validation.share):
            dataset.selection = find_selection(given.shards, dataset.shards, rules)
        datasets.append(dataset)
    return datasets


def find_selection(where: str, shards: list[Shard], rules: Rules) -> Selection:
    """The selection by some rules that data.index has made of the shards.  where: as the shards are given.

    Raises: ValueError if there is none that fits them, or nothing is chosen; OSError.
    """
    digest = rules.digest()
    selection = read_selection(selection_location(where, digest), digest, shards, rules.command(where))
    if not selection.receipt.chosen:
        raise ValueError(f"of '{where}' nothing is chosen: {'; '.join(selection.receipt.lines())}")
    return selection


def validation_datasets(datasets: list[Dataset]) -> list[Dataset]:
    """The samples that data.validation.share holds apart; none of a dataset without any."""
    return [replace(dataset, held=True) for dataset in datasets if dataset.selection and dataset.selection.receipt.held]
