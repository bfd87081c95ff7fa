"""Attention of the pixels over the caption and themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import group_norm, zero_init


class AttentionBlock(nn.Module):
    """Adds to every pixel what it draws, in one attention, from the caption's tokens and from all pixels.

    x: [N, channels, H, W]; text: [N, encoder_channels, L].
    Source: guided-diffusion's AttentionBlock, with the text keys as in DeepFloyd IF.
    """

    def __init__(self, channels: int, num_head_channels: int, encoder_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // num_head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.encoder_kv = nn.Conv1d(encoder_channels, channels * 2, 1)
        self.norm_encoder = group_norm(encoder_channels)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        # The rows of both projections are grouped by head: all of head 0's q, k, v, then head 1's.
        q, k, v = self._heads(self.qkv(self.norm(x).flatten(2)), 3)
        text_k, text_v = self._heads(self.encoder_kv(self.norm_encoder(text)), 2)
        # On the CPU only contiguous q, k, v take SDPA's flash path.
        k = torch.cat([text_k, k], dim=2).contiguous()
        v = torch.cat([text_v, v], dim=2).contiguous()
        h = F.scaled_dot_product_attention(q.contiguous(), k, v)
        h = self.proj_out(h.transpose(2, 3).flatten(1, 2))
        return x + h.view_as(x)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[N, heads * parts * ch, L] -> `parts` times [N, heads, L, ch]."""
        return x.unflatten(1, (self.num_heads, parts, -1)).transpose(3, 4).unbind(2)
