"""Attention of the pixels over the caption and over themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import group_norm, zero_init
from model.config import TEXT_NORM_GROUPS
from model.recompute import call, recomputed


class Projection(nn.Conv1d):
    """A linear layer on [N, L, channels] whose weight has the shape of the released net's 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(2), self.bias)


class AttentionBlock(nn.Module):
    """Adds to every pixel what it attends to, in one attention over the caption's tokens and all pixels.

    self_attention: whether over the pixels too, or over the tokens alone.
    x: [N, channels, H, W]; text: [N, encoder_channels, L].
    Source: guided-diffusion's AttentionBlock, with the text keys as in DeepFloyd IF.
    """

    def __init__(
        self,
        channels: int,
        num_head_channels: int,
        encoder_channels: int,
        norm_groups: int,
        recompute: str = "none",
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.parts = 3 if self_attention else 1
        self.run = recomputed if recompute == "cheap" else call
        self.num_heads = channels // num_head_channels
        self.norm = group_norm(norm_groups, channels)
        self.qkv = Projection(channels, channels * self.parts)
        self.encoder_kv = Projection(encoder_channels, channels * 2)
        self.norm_encoder = group_norm(TEXT_NORM_GROUPS, encoder_channels)
        self.proj_out = zero_init(Projection(channels, channels))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        # The columns of both projections are grouped by head: all of head 0's q, k, v, then head 1's.
        q, *own = self._heads(self.run(self._project, x, self.norm, self.qkv), self.parts)
        k, v = self._heads(self.run(self._project, text, self.norm_encoder, self.encoder_kv), 2)
        if own:
            k, v = torch.cat([k, own[0]], dim=1), torch.cat([v, own[1]], dim=1)
        # q is copied, because a view would keep the projection's k and v for backward too.
        q, k, v = (part.transpose(1, 2) for part in (q.contiguous(), k, v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).view_as(x)

    @staticmethod
    def _project(x: Tensor, norm: nn.GroupNorm, projection: Projection) -> Tensor:
        """[N, in_channels, L], or H, W in place of L, -> [N, L, out_channels]"""
        return projection(norm(x).flatten(2).transpose(1, 2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[N, L, heads * parts * ch] -> `parts` times [N, L, heads, ch], views."""
        return x.unflatten(2, (self.num_heads, parts, -1)).unbind(3)
