"""A checksum of tensors, made by their device of whole numbers, so that the order of adding does not matter."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

# Words that are multiplied at once; eight bytes are allocated for each.
CHUNK = 1 << 20
# Odd constants without a pattern in their bits, as the golden ratio's.
MULTIPLIER, MIXER = -7046029254386353131, -4417276706812531889


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A number, int64 [] on their device, that changes with any bit of the tensors, and with their order.

    The sum of the 32-bit words, each times an odd number of its place, modulo 2^64: one flipped bit always changes it,
    other changes but for one in billions. The host does not wait for the device.
    """
    total: Tensor | None = None
    for tensor in tensors:
        for chunk in _words(tensor).split(CHUNK):
            part = (chunk * _odd_numbers(len(chunk), chunk.device)).sum()
            total = part if total is None else total * MULTIPLIER + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int32 [words], with zeros at the end where it has no whole number of them."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 4 or len(data) % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    return data.view(torch.int32)


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return _all_odd_numbers(device)[:count]


@lru_cache(maxsize=2)
def _all_odd_numbers(device: torch.device) -> Tensor:
    places = (torch.arange(CHUNK, device=device) + 1) * MULTIPLIER
    return (places ^ (places >> 29)) * MIXER | 1
