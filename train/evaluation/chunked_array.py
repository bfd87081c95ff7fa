"""Arrays that several processes make piece by piece, in any order; what is already made is kept."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.progress import Progress
from data.storage.atomic import atomic_file

RANGE = re.compile(r"(\d{6})-(\d{6})")


class ChunkedArray:
    """An array [n, ...] in pieces, each a file FIRST-STOP.KIND.npy with the rows from first to stop."""

    def __init__(self, folder: Path, kind: str, n: int) -> None:
        self.folder, self.kind, self.n = folder, kind, n
        folder.mkdir(parents=True, exist_ok=True)

    def missing(self, size: int) -> list[tuple[int, int]]:
        """(first, stop) of pieces of at most `size` rows that cover all that is not made yet."""
        made = [row for path in self._paths() for row in _rows(path)]
        bounds = [0, *made, self.n]
        gaps = zip(bounds[::2], bounds[1::2], strict=True)
        return [(first, min(first + size, stop)) for start, stop in gaps for first in range(start, stop, size)]

    def write(self, first: int, values: np.ndarray) -> None:
        """Write the piece that begins at row `first`."""
        name = f"{first:06d}-{first + len(values):06d}.{self.kind}.npy"
        with atomic_file(self.folder / name) as aside, open(aside, "wb") as file:
            np.save(file, values, allow_pickle=False)

    def read(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows from first to stop that are made.

        Raises: ValueError if a file is damaged.
        """
        stop, pieces = self.n if stop is None else stop, []
        for path in self._paths():
            start, end = _rows(path)
            if start < stop and end > first:
                try:
                    values = np.load(path, allow_pickle=False)
                except (ValueError, EOFError) as error:
                    raise ValueError(f"'{path}' cannot be read ({error}): delete it and run this again") from None
                pieces.append(values[max(first - start, 0) : stop - start])
        return np.concatenate(pieces)

    def _paths(self) -> list[Path]:
        return [
            path
            for path in sorted(self.folder.glob(f"*.{self.kind}.npy"))
            if RANGE.fullmatch(path.name.removesuffix(f".{self.kind}.npy"))
        ]


def _rows(path: Path) -> tuple[int, int]:
    first, _, stop = path.name.partition(".")[0].partition("-")
    return int(first), int(stop)


@dataclass(slots=True)
class ArrayFiller:
    """Shares the making of arrays among the ranks, `batch_size` rows at a time."""

    batch_size: int
    rank: int
    ranks: int

    def fill(self, array: ChunkedArray, make: Callable[[int, int], np.ndarray], description: str) -> None:
        """Make this rank's share of the missing rows, and wait for the other ranks; a collective call.

        make: (first, stop) -> the rows between.  description: for the progress.
        """
        import torch.distributed as dist  # imported here: --help of the commands that import this file needs no torch

        missing = array.missing(self.batch_size)
        dist.barrier()  # no rank writes before all have listed what is missing
        pieces = [missing[at : at + self.ranks] for at in range(0, len(missing), self.ranks)]
        made = array.n - sum(stop - first for first, stop in missing)
        with Progress(description, array.n, "picture", array.folder, made) as progress:
            for of_ranks in pieces:
                if self.rank < len(of_ranks):
                    first, stop = of_ranks[self.rank]
                    array.write(first, make(first, stop))
                progress.update(sum(stop - first for first, stop in of_ranks))  # the others make theirs meanwhile
        dist.barrier()
