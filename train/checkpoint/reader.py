"""The flat tensors of a checkpoint, as if the parts that its ranks wrote lay one after another in one file.

So are the sums of those of several.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train import adam_state
from train.checkpoint.format import part_file


class CheckpointReader:
    """Reads the elements that are asked for and no others, so that any number of ranks share the reading."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._files = [folder / part_file(rank) for rank in range(ranks)]
        with safe_open(self._files[0], framework="pt") as file:
            self._names = list(file.keys())
            own = next(name for name in self._names if not name.startswith("moments."))  # all others are as long
            self.size = int(file.get_slice(own).get_shape()[0])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of 'master' or an average in fp32; zeros beyond the end."""
        pieces = []
        for number, first, last in self._overlaps(start, stop):
            with safe_open(self._files[number], framework="pt") as file:
                pieces.append(file.get_slice(name)[first:last].float())
        return _joined(pieces, stop - start)

    def moments_of_rank(self, rank: int) -> dict[str, Tensor]:
        """The optimizer's state as a rank wrote it; empty before the first step."""
        with safe_open(self._files[rank], framework="pt") as file:
            return {name.removeprefix("moments."): file.get_tensor(name) for name in self._moments}

    def moments(self, start: int, stop: int) -> tuple[Tensor, Tensor, int] | None:
        """Elements [start, stop) of Adam's two moments in fp32, also if they were stored in 8 bits, and Adam's step."""
        if not self._moments:
            return None
        pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, first, last in self._overlaps(start, stop):
            with safe_open(self._files[number], framework="pt") as file:
                state = {name.removeprefix("moments."): file.get_slice(name) for name in self._moments}
                for which in (1, 2):
                    pieces[which - 1].append(adam_state.decode(state, which, first, last))
        # It is the same in every file, and not all ranks should open one.
        own = self._files[min(start // self.size, len(self._files) - 1)]
        with safe_open(own, framework="pt") as file:
            step = int(file.get_tensor("moments.step"))
        return _joined(pieces[0], stop - start), _joined(pieces[1], stop - start), step

    @property
    def _moments(self) -> list[str]:
        return [name for name in self._names if name.startswith("moments.")]

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The files that hold elements [start, stop): (file number, first element in it, last + 1)."""
        overlaps = []
        for number in range(start // self.size, min(-(-stop // self.size), len(self._files))):
            base = number * self.size
            overlaps.append((number, max(start - base, 0), min(stop - base, self.size)))
        return overlaps


@dataclass(frozen=True, slots=True)
class PostHocAverage:
    """An average of some length as a sum of others; train.checkpoint.post_hoc finds it.

    terms: coefficient, the checkpoint or snapshot of an average, and its name there.
    """

    length: float
    terms: list[tuple[float, CheckpointReader, str]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in fp32, as CheckpointReader.read gives those of `name`."""
        first, *others = (factor * reader.read(own, start, stop) for factor, reader, own in self.terms)
        for other in others:
            first += other
        return first


def _joined(pieces: list[Tensor], length: int) -> Tensor:
    missing = length - sum(len(piece) for piece in pieces)
    if missing:
        pieces = [*pieces, torch.zeros(missing)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
