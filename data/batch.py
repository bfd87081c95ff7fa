"""What crosses from the stream into the training: one micro batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """A micro batch of N samples.

    Shapes: pixels [N, 3, H, W] uint8; text_emb [N, L, D]; visit [N] int64; weight [N] float32.
    visit: epoch x samples in the dataset + the sample's index, the key of all its random draws.
    weight: 1, or 0 where the sample could not be read: its place is filled with zeros and adds nothing to the loss.
    bad: (sample, reason) for each weight of 0.
    """

    pixels: Tensor
    text_emb: Tensor
    visit: Tensor
    weight: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)

    def x_start(self, device: torch.device) -> Tensor:
        """The images in [-1, 1], [N, 3, H, W] float32, on the device."""
        return self.pixels.to(device, non_blocking=True).float() / 127.5 - 1.0

    def pin_memory(self) -> "Batch":
        """Page-locked copies; DataLoader calls this by name."""
        return Batch(
            self.pixels.pin_memory(), self.text_emb.pin_memory(), self.visit, self.weight.pin_memory(), self.bad
        )
