"""The residual block, and the initialisations that the whole net shares."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import make_activation

NORM_GROUPS = 32
M = TypeVar("M", bound=nn.Module)


def group_norm(channels: int) -> nn.GroupNorm:
    """The net's normalisation: 32 groups, eps 1e-5; its statistics are fp32 for bf16 inputs too."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-5)


def zero_init(module: M) -> M:
    """The module with every parameter at zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second scaled and shifted by the embedding, beside a shortcut.

    x: [N, in_channels, H, W]; emb: [N, emb_channels], already activated.
    resample: 'down' halves and 'up' doubles H and W, 'none' keeps them.
    Source: guided-diffusion's ResBlock with scale-shift norm and resblock_updown.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, activation: str, resample: str = "none"
    ) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            group_norm(in_channels),
            make_activation(activation),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        # The activation of the embedding is the same for all blocks, so the UNet applies it once; the place stays
        # for the released weights' names.
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(emb_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            make_activation(activation),
            nn.Identity(),  # where the released net has its dropout of 0
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self._resample(act(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        norm, act, _, conv = self.out_layers
        h = conv(act(torch.addcmul(shift, norm(h), 1 + scale)))
        return self.skip_connection(self._resample(x)) + h

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x
