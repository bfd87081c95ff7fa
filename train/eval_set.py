"""The captioned pictures that an evaluation draws prompts from and compares with; arrays kept piece by piece."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cursor import RawSample, ShardCursor
from data.shards import Shard
from data.text import TextMeta, read_empty, read_into
from data.transforms import preprocess

RANGE = re.compile(r"(\d{6})-(\d{6})")


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


class Pieces:
    """An array [n, ...] made in pieces, in any order and by several processes, each a file FIRST-STOP.KIND.npy."""

    def __init__(self, folder: Path, kind: str, n: int) -> None:
        self.folder, self.kind, self.n = folder, kind, n
        folder.mkdir(parents=True, exist_ok=True)

    def missing(self, size: int) -> list[tuple[int, int]]:
        """(first, stop) of pieces of at most `size` for all that is not there yet."""
        there = [int(i) for path in self._paths() for i in path.name.split(".")[0].split("-")]
        bounds = [0, *there, self.n]
        gaps = zip(bounds[::2], bounds[1::2], strict=True)
        return [(first, min(first + size, stop)) for start, stop in gaps for first in range(start, stop, size)]

    def write(self, first: int, values: np.ndarray) -> None:
        """Aside, then renamed."""
        path = self.folder / f"{first:06d}-{first + len(values):06d}.{self.kind}.npy"
        aside = path.with_suffix(".part")
        with open(aside, "wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(aside, path)

    def read(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """What is there of the array from first to stop.

        Raises: ValueError if a file is damaged.
        """
        stop, found = self.n if stop is None else stop, []
        for path in self._paths():
            start, end = (int(i) for i in path.name.split(".")[0].split("-"))
            if start < stop and end > first:
                try:
                    values = np.load(path, allow_pickle=False)
                except (ValueError, EOFError) as error:
                    raise ValueError(f"'{path}' cannot be read ({error}): delete it and run this again") from None
                found.append(values[max(first - start, 0) : stop - start])
        return np.concatenate(found)

    def _paths(self) -> list[Path]:
        return [
            path
            for path in sorted(self.folder.glob(f"*.{self.kind}.npy"))
            if RANGE.fullmatch(path.name.removesuffix(f".{self.kind}.npy"))
        ]
