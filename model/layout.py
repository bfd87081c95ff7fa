"""Where the channels of activations lie in memory: before the pixels (NCHW), or after them (NHWC, channels_last)."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, channels, H, W] lies in memory as [N, H, W, channels]."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
