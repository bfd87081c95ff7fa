"""A micro batch, as the loader hands it to the training."""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.text.lowrank_factors import used_bytes


@dataclass(slots=True)
class Batch:
    """A micro batch of N samples.

    Shapes: pixels [N, 3, H, W] uint8; text_emb [N, L, D]; visit [N] int64; weight [N] float32; low_res [N, 3, h, w]
    uint8.
    text_emb: of lowrank their factors [N, bytes] uint8 instead, of which a copy keeps what is used; where the encoder
    runs on the rank, token ids [N, L] int32, -1 at the padding.
    visit: epoch x rows in all shards + the sample's row among them, the key of all its random draws.
    weight: 1, or 0 for a sample that could not be read: its pixels are zeros and it adds nothing to the loss.
    bad: (sample, reason) for each weight of 0.
    lacks: [1] int64, how many of the others had not all the captions among which one was drawn.
    enlarged: [1] int64, how many of the others were cropped from less than H x W pixels.
    low_res: for the second stage, the same crops as small images; None for the first.
    """

    pixels: Tensor
    text_emb: Tensor
    visit: Tensor
    weight: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    lacks: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    enlarged: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    low_res: Tensor | None = None

    @staticmethod
    def shared(
        n: int, image_size: int, text_shape: tuple[int, ...], text_dtype: torch.dtype, low_res_size: int = 0
    ) -> "Batch":
        """A batch of zeros in memory that is shared with processes forked from this one."""
        # A memory mapping for each tensor takes no space in /dev/shm and needs no removal.
        return Batch(
            _shared_zeros((n, 3, image_size, image_size), torch.uint8),
            _shared_zeros((n, *text_shape), text_dtype),
            _shared_zeros((n,), torch.int64),
            _shared_zeros((n,), torch.float32),
            lacks=_shared_zeros((1,), torch.int64),
            enlarged=_shared_zeros((1,), torch.int64),
            low_res=_shared_zeros((n, 3, low_res_size, low_res_size), torch.uint8) if low_res_size else None,
        )

    def copy(self, pin_memory: bool) -> "Batch":
        """A copy in memory of its own; what goes to the device is page-locked if pin_memory."""

        def own(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin_memory).copy_(tensor)

        is_factors = self.text_emb.dtype == torch.uint8
        text_emb = self.text_emb[:, : used_bytes(self.text_emb.numpy())] if is_factors else self.text_emb
        low_res = None if self.low_res is None else own(self.low_res)
        pixels, text_emb, weight = own(self.pixels), own(text_emb), own(self.weight)
        lacks, enlarged = self.lacks.clone(), self.enlarged.clone()
        return Batch(pixels, text_emb, self.visit.clone(), weight, self.bad, lacks, enlarged, low_res)


def _shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
