"""What training on one image takes in floating-point operations (FLOP), and how many a card can do in a second."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import UNetConfig
from train.config import LoRAConfig
from train.monitor.gpus import find_device
from train.weights.lora import unet_on_meta


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOP of the convolutions, matrix products and attention for one image; a multiplication and an addition are two.

    forward: of the forward.  total: of forward and backward, with what the backward computes again.
    """

    forward: int
    total: int


def training_flops(config: UNetConfig, tokens: int, lora: LoRAConfig | None = None, recompute: str = "none") -> Flops:
    """Count the FLOP of one image's forward and backward on a net without contents, of any size, in seconds.

    lora: if its rank is above 0, it alone is trained: no gradient of a frozen weight is computed, and none of an
    activation that lies before the first LoRA matrix.
    recompute: one of model.config.RECOMPUTE; without recomputation the total is what MFU counts.
    """
    unet = unet_on_meta(config, lora, recompute)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        out = unet(x, torch.zeros(1, dtype=torch.int64), torch.empty(1, tokens, config.encoder_dim))
        forward = counter.get_total_flops()
        out.sum().backward()
    return Flops(forward, counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this card; None on a CPU, or for a card that the table of GPUs does not have."""
    gpu = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops * 1e12 if gpu else None
