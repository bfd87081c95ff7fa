"""The conditions of every block: the timestep as sines and cosines, the caption as one pooled vector."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of a timestep at geometrically spaced frequencies.

    timesteps: [N], integers or fractions. Returns fp32 [N, dim], dim even.
    Source: Vaswani et al. 2017, section 3.5; order and spacing as in guided-diffusion.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AttentionPooling(nn.Module):
    """Pools tokens into one vector: their mean, plus a learned offset, attends to itself and to all of them.

    [N, L, dim] -> [N, dim]. Source: the encoder pooling of DeepFloyd IF.
    """

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = tokens.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([query, tokens], dim=1)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens))
        return F.scaled_dot_product_attention(q, k, v).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, dim] -> [N, heads, L, dim / heads], contiguous."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()
