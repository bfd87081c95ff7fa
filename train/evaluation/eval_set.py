"""The captioned pictures that an evaluation draws prompts from and compares with; arrays kept piece by piece."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.images import preprocess
from data.loader.cursor import RawSample, ShardCursor
from data.storage.shards import Shard
from data.text.embeddings import read_empty, read_into
from data.text.meta import TextMeta


@dataclass
class Pictures:
    """`samples` captioned pictures, drawn without replacement from shards.

    Raises: ValueError if there are fewer.
    """

    shards: list[Shard]
    samples: int
    seed: int

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= self.total:
            raise ValueError(
                f"samples={self.samples}: the shards hold {self.total} captioned pictures; take from 2 to that many"
            )

    @property
    def total(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def digest(self) -> str:
        """Which pictures these are, in which order, as far as names and counts tell."""
        told = [[(shard.name, shard.count) for shard in self.shards], self.samples, self.seed]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def captions(self, first: int, stop: int) -> list[str]:
        """Of the pictures from first to stop."""
        return [raw.caption.decode("utf-8", "replace") for raw in self._read(first, stop, "")]

    def pictures(self, first: int, stop: int, image_size: int) -> np.ndarray:
        """From first to stop, uint8 [n, 3, H, W], by the recipe's preprocessing without a shift of the crop.

        Raises: ValueError if one cannot be read.
        """
        unused, made = np.random.default_rng(0), []
        for raw in self._read(first, stop, ""):
            try:
                made.append(preprocess(raw.image, image_size, 0.0, unused))
            except ValueError as error:
                raise ValueError(_unusable(raw, error)) from None
        return np.stack(made)

    def _read(self, first: int, stop: int, text: str) -> Iterator[RawSample]:
        drawn = np.sort(np.random.default_rng(self.seed).permutation(self.total)[: self.samples])[first:stop]
        ends = np.cumsum([shard.count for shard in self.shards])
        number = np.searchsorted(ends, drawn, side="right")
        for at in np.unique(number).tolist():
            cursor = ShardCursor(self.shards[at], text, "fail")
            for row in (drawn[number == at] - (ends[at] - self.shards[at].count)).tolist():
                raw = cursor.read(row)
                if raw.problem:
                    raise ValueError(_unusable(raw, raw.problem))
                yield raw
            cursor.close()


@dataclass
class EvalSet(Pictures):
    """Pictures whose captions are embedded; prompt i is the caption of the i-th."""

    text: str
    meta: TextMeta

    @property
    def empty(self) -> np.ndarray:
        """The embedding of the empty caption."""
        return read_empty(self.text, self.meta)

    def embeddings(self, first: int, stop: int) -> np.ndarray:
        """[n, tokens, dim], of the captions from first to stop.

        Raises: ValueError if one cannot be read.
        """
        raws = list(self._read(first, stop, self.text))
        made = np.empty((len(raws), *self.meta.shape), self.meta.array_dtype)
        for raw, out in zip(raws, made, strict=True):
            try:
                read_into(out, raw.embedding, self.meta)
            except (ValueError, OSError) as error:
                raise ValueError(_unusable(raw, error)) from None
        return made


def _unusable(raw: RawSample, problem: object) -> str:
    return (
        f"{raw.name} cannot be used ({problem}), and without it the score would be of other pictures: mend the shards"
    )
