"""From the factors of captions of the form lowrank to their text states, on any device: the same bits on all.

The sums of products are whole numbers below 2^53, which are exact in float64 in whichever order they are made, with or
without fused additions. Not in float32, where TF32 or a sum above 2^24 would round. What follows is one product and one
sum of each number, in float32, so it must not be compiled, which may fuse them. Nothing is read on the host.
"""

import numpy as np
import torch
from torch import Tensor

from data.text.lowrank import known_channels
from data.text.lowrank_factors import FACTORS


class LowrankProduct:
    """Makes text states of factors.

    empty: [tokens, dim] float32, the states of the empty caption.  The channels are those that are known by now.
    """

    def __init__(self, empty: np.ndarray, device: torch.device) -> None:
        known = known_channels(empty.shape[1])
        self._hashes = torch.tensor(list(known), dtype=torch.int64, device=device)
        self._center, self._scale = (
            torch.from_numpy(np.stack([getattr(channels, name) for channels in known.values()])).to(device)
            for name in ("center", "scale")
        )
        self._empty = torch.from_numpy(empty).to(device)

    @torch.no_grad()
    def states(self, factors: Tensor) -> Tensor:
        """[N, tokens, dim] float32.  factors: [N, bytes] uint8 on the device, as from read_factors."""
        tokens, dim = self._empty.shape
        head, rows = factors.split([FACTORS.size, factors.shape[1] - FACTORS.size], 1)
        wanted, steps = _view(head[:, :8], torch.int64), _view(head[:, 8:16], torch.float32)
        channels = torch.searchsorted(self._hashes, wanted[:, 0]).clamp(max=len(self._hashes) - 1)
        # Other channels than those that were known make no states; the empty caption needs none.
        steps = steps.masked_fill(self._hashes[channels, None] != wanted, torch.nan)
        used, length, is_empty = _view(head[:, 16:28], torch.int32)[:, :, None].unbind(1)
        # What lies behind a caption's own rows is left from others.
        rows = rows.unflatten(1, (-1, 4 * tokens + dim))
        behind = FACTORS.size + torch.arange(rows.shape[1], device=rows.device) * rows.shape[2] >= used
        coefficients = _view(rows[:, :, : 4 * tokens], torch.float32).masked_fill(behind[:, :, None], 0)
        sums = coefficients.double().mT @ rows[:, :, 4 * tokens :].view(torch.int8).double()
        padding = torch.arange(tokens, device=rows.device) >= length
        step = torch.where(padding, steps[:, 1:], steps[:, :1])[:, :, None]
        center = torch.where(padding[:, :, None], self._center[channels, 1:], self._center[channels, :1])
        states = sums.float() * (self._scale[channels][:, None] * step) + center
        return torch.where(is_empty[:, :, None] > 0, self._empty, states)


def _view(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, in memory of their own, where they are aligned."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
