"""A checksum of tensors, made by their device of whole numbers, so that the order of adding does not matter."""

from collections.abc import Iterable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

# Words that are multiplied at once; eight bytes are allocated for each.
CHUNK = 1 << 20
# Odd constants without a pattern in their bits, as the golden ratio's.
MULTIPLIER, MIXER = -7046029254386353131, -4417276706812531889


class Corrupted(RuntimeError):
    """A rank has other numbers than it should have; all ranks raise it together, before they save."""


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


def gradient_checksum(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The checksum of the gradient of a loss, and its norm, float32 []; no parameter's own gradient is touched.

    Each part is summed as it comes and its memory is freed: the whole would take as much as the weights.
    """
    sums, norms = dict[int, Tensor](), dict[int, Tensor]()

    def take(place: int, part: Tensor) -> Tensor:
        sums[place] = checksum([part])
        norms[place] = torch.linalg.vector_norm(part.detach(), dtype=torch.float32)
        return part.new_zeros(()).expand_as(part)  # takes the place of the gradient, and no memory

    # After the forward, which may be compiled for parameters without hooks.
    hooks = [parameter.register_hook(partial(take, place)) for place, parameter in enumerate(parameters)]
    try:
        torch.autograd.grad(loss, parameters)
    finally:
        for hook in hooks:
            hook.remove()
    places = range(len(parameters))
    return checksum([torch.stack([sums[i] for i in places])]), torch.stack([norms[i] for i in places]).norm()


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
