"""Loads a trained net to sample from; the one place that says in which dtype."""

from pathlib import Path

import torch
from torch import Tensor

from model.config import UNetConfig
from model.unet import UNet
from train.checkpoint.checkpoint import Checkpoint
from train.weights.lora import unet_on_meta
from train.weights.pretrained import load_pretrained, net_weights


def sampling_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU for a net that was trained in it, float32 otherwise.  precision: 'bf16' or 'fp32'."""
    return torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32


def load_net(checkpoint: Checkpoint, weights: str, device: torch.device) -> UNet:
    """The net of a checkpoint, frozen, on the device.  weights: 'ema' or 'master'.

    Raises: ValueError, as net_weights.
    """
    return _frozen(net_weights(checkpoint, weights), checkpoint.model, checkpoint.config["precision"], device)


def load_released_net(path: str | Path, config: UNetConfig, device: torch.device) -> UNet:
    """A net of the config with released weights, frozen, on the device; in bfloat16 on a GPU.

    Raises: ValueError, as load_pretrained.
    """
    return _frozen(load_pretrained(path, config), config, "bf16", device)


def _frozen(weights: dict[str, Tensor], config: UNetConfig, precision: str, device: torch.device) -> UNet:
    unet = unet_on_meta(config)
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.to(device, sampling_dtype(precision, device)).eval().requires_grad_(False)
