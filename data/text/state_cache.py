"""States that the frozen encoder has made, kept on the host for captions that are seen again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it takes seconds to import, and a cache is made for one that is there
    from data.text.encoder import TextEncoder


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
        self._kept: Tensor | None = None
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
        assert self._kept is not None
        self.taken += len(keys)
        states = torch.empty((len(keys), *self._kept.shape[1:]), dtype=self._kept.dtype, device=token_ids.device)
        for state, key in zip(states, keys, strict=True):
            state.copy_(self._kept[self._rows[key]], non_blocking=True)
        return states

    def pop_share(self) -> float:
        """The share of captions that were taken from here since the last call."""
        share = self.taken / max(self.asked, 1)
        self.asked = self.taken = 0
        return share

    def _keep(self, keys: list[bytes], states: Tensor) -> None:
        if self._kept is None:
            # Page-locked, so that copies from and to a GPU are made in the order of its stream, without a wait.
            pin = states.device.type == "cuda"
            self._kept = torch.empty((self._captions, *states.shape[1:]), dtype=states.dtype, pin_memory=pin)
        for state, key in zip(states, keys, strict=True):
            if key not in self._rows and len(self._rows) < self._captions:
                self._kept[len(self._rows)].copy_(state, non_blocking=True)
                self._rows[key] = len(self._rows)
