"""The residual block, and the norm and initialisation that the whole net shares."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import make_activation
from model.layout import is_channels_last
from model.recompute import call, recomputed

M = TypeVar("M", bound=nn.Module)
# Keeps the variance of a sum of shortcut and branch: 1 / sqrt(2), to the digits that the released nets have.
SKIP_SCALE = 0.7071


class GroupNorm(nn.GroupNorm):
    """torch's; compiled, its result lies in memory as its input does. On a GPU that of torch's own is in NCHW.

    x: [N, channels, H, W] or [N, channels, L].
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.by_channel(x, self.weight, self.bias) if compiles_channels_last(x) else super().forward(x)

    def by_channel(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The norm of an x in channels_last, with another weight and bias, each [channels] or [N, 1, 1, channels].

        The compiler makes two kernels of it: the statistics, and the rest.
        """
        groups = x.permute(0, 2, 3, 1).unflatten(3, (self.num_groups, -1))
        groups = groups.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(groups, dim=(1, 2, 4), correction=0, keepdim=True)
        h = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(3)
        return (h * weight + bias).to(x.dtype).permute(0, 3, 1, 2)


def compiles_channels_last(x: Tensor) -> bool:
    """Whether x lies so, and what is done with it is compiled: only then many operations cost no more than one."""
    return torch.compiler.is_compiling() and is_channels_last(x)


def group_norm(groups: int, channels: int) -> GroupNorm:
    """The net's normalisation, with eps 1e-5; its statistics are fp32, also for bf16 inputs."""
    return GroupNorm(groups, channels, eps=1e-5)


def zero_init(module: M) -> M:
    """The module with every parameter set to zero, so that a residual branch adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def scale_shift_norm(norm: GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in one pass over x: each sample's scale and shift are folded into the norm's own.

    x: [N, channels, H, W], in two passes if it is channels_last and not compiled; scale, shift: [N, channels].
    """
    if not x.is_contiguous() and not compiles_channels_last(x):  # without a copy, samples cannot become groups
        return torch.addcmul(shift[:, :, None, None], norm(x), 1 + scale[:, :, None, None])
    weight = norm.weight * (1 + scale)
    bias = torch.addcmul(shift, norm.bias, 1 + scale)
    if not x.is_contiguous():
        return norm.by_channel(x, weight[:, None, None], bias[:, None, None])
    samples_as_groups = x.reshape(1, -1, *x.shape[2:])
    groups = x.shape[0] * norm.num_groups
    return F.group_norm(samples_as_groups, groups, weight.flatten(), bias.flatten(), norm.eps).view_as(x)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second scaled and shifted by the embedding, beside a shortcut.

    x: [N, in_channels, H, W], or its first channels, with the rest in skip; emb: [N, emb_channels], already activated.
    resample: 'down' halves and 'up' doubles H and W, 'none' keeps them.  scale_skip: whether the sum is scaled.
    Source: guided-diffusion's ResBlock with scale-shift norm and resblock_updown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        norm_groups: int,
        activation: str,
        resample: str = "none",
        recompute: str = "none",
        scale_skip: bool = False,
    ) -> None:
        super().__init__()
        self.run = recomputed if recompute == "cheap" else call
        self.resample, self.scale_skip = resample, scale_skip
        self.in_layers = nn.Sequential(
            group_norm(norm_groups, in_channels),
            make_activation(activation, recompute),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        # The activation of the embedding is the same for all blocks, so the UNet applies it once; the Identity keeps
        # the released weights' names.
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(emb_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            group_norm(norm_groups, out_channels),
            make_activation(activation, recompute),
            nn.Identity(),  # where the released net has its dropout of 0
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        parts = (x,) if skip is None else (x, skip)
        if self.run is call:
            parts = (_join(*parts),)
        h = self.run(self._in, *parts)
        h = self.run(self._out, h, self.emb_layers(emb))
        if isinstance(self.skip_connection, nn.Identity):
            h = self._resample(_join(*parts)) + h
        else:
            h = self.run(self._shortcut, *parts) + h
        return h * SKIP_SCALE if self.scale_skip else h

    def _in(self, *parts: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        return conv(self._resample(act(norm(_join(*parts)))))

    def _out(self, h: Tensor, scale_shift: Tensor) -> Tensor:
        norm, act, _, conv = self.out_layers
        scale, shift = scale_shift.chunk(2, dim=1)
        return conv(act(scale_shift_norm(norm, h, scale, shift)))  # type: ignore[arg-type]

    def _shortcut(self, *parts: Tensor) -> Tensor:
        return self.skip_connection(_join(*parts))

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
