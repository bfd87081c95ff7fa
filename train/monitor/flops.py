"""What training on one image takes in floating-point operations (FLOP), and how many a card can do in a second."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import UNetConfig
from train.config import LoRAConfig
from train.monitor.gpus import find_device
from train.monitor.step_memory import inputs
from train.weights.lora import unet_on_meta


@dataclass(frozen=True, slots=True)
class Gradient:
    """A parameter's gradient: the parameter's name and elements, and the FLOP of the backward when it is ready."""

    name: str
    elements: int
    flops: int


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOP of the convolutions, matrix products and attention for one image; a multiplication and an addition are two.

    forward: of the forward.  total: of forward and backward, with what the backward computes again.
    gradients: of the trained parameters, in the order in which the backward makes them.
    """

    forward: int
    total: int
    gradients: tuple[Gradient, ...]

    @property
    def backward(self) -> int:
        return self.total - self.forward


def training_flops(config: UNetConfig, tokens: int, lora: LoRAConfig | None = None, recompute: str = "none") -> Flops:
    """Count the FLOP of one image's forward and backward on a net without contents, of any size, in seconds.

    lora: if its rank is above 0, it alone is trained: no gradient of a frozen weight is computed, and none of an
    activation that lies before the first LoRA matrix.
    recompute: one of model.config.RECOMPUTE; without recomputation the total is what MFU counts.
    """
    # The exact GELU, which is one operation; those of fewer bits have hundreds, and no more FLOP as they are counted.
    unet = unet_on_meta(replace(config, activation="gelu"), lora, recompute)
    gradients: list[Gradient] = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:

        def ready(name: str, parameter: Tensor) -> None:
            gradients.append(Gradient(name, parameter.numel(), counter.get_total_flops() - forward))

        for name, parameter in unet.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(ready, name))
        out = unet(*inputs(config, 1, tokens))
        forward = counter.get_total_flops()
        out.sum().backward()
    return Flops(forward, counter.get_total_flops(), tuple(gradients))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this card; None on a CPU, or for a card that the table of GPUs does not have."""
    gpu = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops * 1e12 if gpu else None
