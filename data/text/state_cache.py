"""States that the frozen encoder has made, kept on the host for captions that are seen again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it takes seconds to import, and a cache is made for one that is there
    from data.text.encoder import TextEncoder


# Of page-locked memory, of which torch rounds each piece up to a power of two.
BLOCK_BYTES = 2**28


def block_rows(captions: int, of_each: int) -> list[int]:
    """How many captions each block of a cache holds.  of_each: bytes of a caption's states."""
    rows = max(BLOCK_BYTES // of_each, 1)
    return [min(rows, captions - first) for first in range(0, captions, rows)]


def cache_bytes(captions: int, of_each: int) -> int:
    """Bytes of a cache, its blocks as torch rounds them.  of_each: bytes of a caption's states."""
    return sum(1 << (rows * of_each - 1).bit_length() for rows in block_rows(captions, of_each))


class StateCache:
    """The states of all captions of a small set, at most `captions` of them, in the encoder's dtype.

    A batch is taken from here if all of its captions are known. Any other is encoded whole, as it would be without a
    cache. So the encoder sees batches of one size, in which the bits of a caption's states do not depend on the others
    (docs/measurements/embeddings.md).
    asked, taken: captions that were asked for, and those of batches that were taken from here, since pop_share().
    """

    def __init__(self, encoder: "TextEncoder", captions: int) -> None:
        self._encoder, self._captions = encoder, captions
        self._rows: dict[bytes, int] = {}
        self._kept: list[Tensor] = []  # by row: views of the blocks
        self.asked = self.taken = 0

    def states(self, token_ids: Tensor, on_host: Tensor) -> Tensor:
        """[N, tokens, dim] on the device, without a wait for it.

        token_ids: [N, tokens] int32 on the device, as from TextEncoder.token_ids.  on_host: the same on the host.
        """
        keys = [ids.tobytes() for ids in on_host.numpy()]
        self.asked += len(keys)
        if not all(key in self._rows for key in keys):
            states = self._encoder.states(token_ids)
            self._keep(keys, states)
            return states
        self.taken += len(keys)
        kept = self._kept[0]
        states = torch.empty((len(keys), *kept.shape), dtype=kept.dtype, device=token_ids.device)
        for state, key in zip(states, keys, strict=True):
            state.copy_(self._kept[self._rows[key]], non_blocking=True)
        return states

    def pop_share(self) -> float:
        """The share of captions that were taken from here since the last call."""
        share = self.taken / max(self.asked, 1)
        self.asked = self.taken = 0
        return share

    def _keep(self, keys: list[bytes], states: Tensor) -> None:
        if not self._kept:
            # Page-locked, so that copies from and to a GPU are made in the order of its stream, without a wait.
            pin = states.device.type == "cuda"
            for rows in block_rows(self._captions, states[0].nbytes):
                self._kept += torch.empty((rows, *states.shape[1:]), dtype=states.dtype, pin_memory=pin)
        for state, key in zip(states, keys, strict=True):
            if key not in self._rows and len(self._rows) < self._captions:
                self._kept[len(self._rows)].copy_(state, non_blocking=True)
                self._rows[key] = len(self._rows)
