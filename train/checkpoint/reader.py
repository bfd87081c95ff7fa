"""The flat tensors of a checkpoint, as if the parts that its ranks wrote lay one after another in one file."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from train.checkpoint.format import part_file

# bitsandbytes scales its 8-bit states in blocks of this many elements, counted from the start of each rank's part.
BLOCK = 256


class CheckpointReader:
    """Reads the elements that are asked for and no others, so that any number of ranks share the reading."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._files = [folder / part_file(rank) for rank in range(ranks)]
        with safe_open(self._files[0], framework="pt") as file:
            self.size = int(file.get_slice("master").get_shape()[0])
            self._names = list(file.keys())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of 'master' or 'ema' in fp32; zeros beyond the end."""
        pieces = []
        for number, first, last in self._overlaps(start, stop):
            with safe_open(self._files[number], framework="pt") as file:
                pieces.append(file.get_slice(name)[first:last])
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
                for order in (1, 2):
                    pieces[order - 1].append(self._moment(file, order, first, last))
        with safe_open(self._files[0], framework="pt") as file:
            step = int(file.get_tensor("moments.step"))
        return _joined(pieces[0], stop - start), _joined(pieces[1], stop - start), step

    def _moment(self, file: safe_open, order: int, first: int, last: int) -> Tensor:
        if "moments.exp_avg" in self._names:  # torch's AdamW
            return file.get_slice(("moments.exp_avg", "moments.exp_avg_sq")[order - 1])[first:last]
        state = file.get_slice(f"moments.state{order}")
        if f"moments.absmax{order}" not in self._names:  # bitsandbytes keeps fewer than 4096 elements in fp32
            return state[first:last]
        block, end = first // BLOCK, -(-last // BLOCK)
        codes = state[block * BLOCK : min(end * BLOCK, self.size)]
        scales = file.get_slice(f"moments.absmax{order}")[block:end].repeat_interleave(BLOCK)[: len(codes)]
        values = file.get_tensor(f"moments.qmap{order}")[codes.int()] * scales
        return values[first - block * BLOCK : last - block * BLOCK]

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


def _joined(pieces: list[Tensor], length: int) -> Tensor:
    missing = length - sum(len(piece) for piece in pieces)
    if missing:
        pieces = [*pieces, torch.zeros(missing)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
