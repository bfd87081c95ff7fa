"""A dataset: its shards and which of their samples are chosen, its embeddings, its share of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from data.config import CaptionConfig, DataConfig
from data.selection.rules import Rules, selection_location
from data.selection.stored import CHOSEN, HELD, Selection, read_selection
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
    selection: which samples are chosen; None for all.  held: the dataset is of those that are held apart instead.
    """

    shards: list[Shard]
    text: str
    weight: float = 1.0
    encoder: "TextEncoder | None" = None
    captions: list[CaptionConfig] = field(default_factory=lambda: [CaptionConfig()])
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

    @property
    def fields(self) -> list[str]:
        """The fields of the captions, in their order."""
        return [caption.field for caption in self.captions]


def find_datasets(config: DataConfig) -> list[Dataset]:
    """The datasets of a config, with their shards and selections.

    Raises: ValueError if one has no shards, or rules without a selection by them that fits the shards; OSError.
    """
    datasets = []
    for given in config.datasets():
        dataset = Dataset(find_shards(given.shards), given.text, given.weight, captions=config.captions)
        if rules := Rules(given.where, tuple(given.drop), config.validation.share):
            dataset.selection = find_selection(given.shards, dataset.shards, rules)
        datasets.append(dataset)
    return datasets


def find_selection(where: str, shards: list[Shard], rules: Rules) -> Selection:
    """The selection by some rules that data.index has made of the shards.  where: as the shards are given.

    Raises: ValueError if there is none that fits them, or nothing is chosen; OSError.
    """
    try:
        digest = rules.digest()
    except OSError as error:
        raise ValueError(f"a list of data.drop cannot be read: {error}") from None
    selection = read_selection(selection_location(where, digest), digest, shards, rules.command(where))
    if not selection.receipt.chosen:
        raise ValueError(f"of '{where}' nothing is chosen: {'; '.join(selection.receipt.lines())}")
    return selection


def validation_datasets(datasets: list[Dataset]) -> list[Dataset]:
    """The samples that data.validation.share holds apart; none of a dataset without any."""
    return [replace(dataset, held=True) for dataset in datasets if dataset.selection and dataset.selection.receipt.held]


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
