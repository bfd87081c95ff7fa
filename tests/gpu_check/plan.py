"""What launch.plan's own functions say of a net: bytes, the micro batch that fits, floating-point operations."""

from dataclasses import replace

import torch

from model.config import UNetConfig
from model.super_resolution import make_net
from tests.gpu_check.nets import KEEP, TOKENS
from train.monitor.flops import peak_flops, training_flops
from train.monitor.memory import peak, states
from train.monitor.step_memory import Bytes, step_bytes

BF16_BYTES = 2
# Of a card: CUDA, cuDNN's workspaces and fragments, as launch.plan's reserve_gb.
RESERVE = 5e9
# The ranks of the published trainings, over which masters and moments are cut.
RANKS = 512


def parameters(config: UNetConfig) -> int:
    """Parameters of the net."""
    return sum(sizes(config))


def sizes(config: UNetConfig) -> list[int]:
    """Elements of each parameter."""
    with torch.device("meta"):
        return [p.numel() for p in make_net(config).parameters()]


def net_bytes(
    config: UNetConfig, micro_batch: int, activation: str, recompute: str = KEEP, accumulated: bool = False
) -> Bytes:
    """Of a bf16 net's forward and backward, without the weights; accumulated: with gradients there already."""
    config = replace(config, activation=activation)
    return step_bytes(config, micro_batch, "bf16", accumulated, TOKENS, recompute=recompute)


def training_bytes(config: UNetConfig, micro_batch: int, activation: str, recompute: str) -> int:
    """The most of a training on one rank that accumulates: weights, masters, moments, average, and a step."""
    count, largest = parameters(config), max(sizes(config))
    step = net_bytes(config, micro_batch, activation, recompute, accumulated=True)
    return states(count, 1, "adamw8bit", BF16_BYTES).total + peak(step, count, 1, BF16_BYTES, largest).most


def largest_micro_batch(config: UNetConfig, memory: float, activation: str, beside: int = 0) -> int:
    """The largest that fits a card of so many bytes as one rank of RANKS, and `beside` bytes of other nets; at least 1.

    The bytes of a step grow by the same for each image.
    """
    count, largest = parameters(config), max(sizes(config))
    room = memory - RESERVE - states(count, RANKS, "adamw8bit", BF16_BYTES).total - beside
    one, two = (
        peak(net_bytes(config, n, activation, accumulated=True), count, RANKS, BF16_BYTES, largest).backward
        for n in (1, 2)
    )
    return max(1, int((room - one) // (two - one)) + 1)


def flops_per_image(config: UNetConfig) -> float:
    """Of the forward and backward, recomputation not counted."""
    return training_flops(config, TOKENS).total


def card_peak(device: str) -> float | None:
    """The card's dense bf16 FLOP/s by its data sheet; None for a CPU or an unknown card."""
    return peak_flops(torch.device(device))
