"""What a training image costs in floating-point operations, and how many of them a card can do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import UNetConfig
from model.unet import UNet
from train.config import LoRAConfig
from train.weights.lora import add_lora

# Dense bfloat16 peak, FLOP/s, from the makers' data sheets; the longer name before the one it begins with.
PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def training_flops(config: UNetConfig, tokens: int, lora: LoRAConfig | None = None) -> float:
    """FLOP of the forward and backward of one image, without recomputation; no memory is taken for the net.

    lora: where it alone is trained, the gradients of the frozen weights are not computed.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet(config)
        if lora and lora.rank:
            add_lora(unet, lora, on_meta=True)
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        unet(x, torch.zeros(1, dtype=torch.int64), torch.empty(1, tokens, config.encoder_dim)).sum().backward()
    return float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Of this card, FLOP/s; None on a CPU, or for a card that PEAK does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for card, value in PEAK.items() if card in name), None)
