"""Arrays made piece by piece, by several processes in any order."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

RANGE = re.compile(r"(\d{6})-(\d{6})")


class ChunkedArray:
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


@dataclass(slots=True)
class Work:
    """How the ranks share what is to be made, `size` pictures at a time."""

    size: int
    rank: int
    ranks: int

    def fill(self, pieces: ChunkedArray, make: Callable[[int, int], np.ndarray], told: str) -> None:
        """Make this rank's share of what is missing; done when all have made theirs; a collective call."""
        todo = pieces.missing(self.size)
        dist.barrier()  # nobody writes before all have looked
        for first, stop in tqdm(todo[self.rank :: self.ranks], told, unit="batch", disable=bool(self.rank) or not todo):
            pieces.write(first, make(first, stop))
        dist.barrier()
