"""The memory of one micro batch, of the real net on tensors without contents."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import UNetConfig
from model.unet import UNet
from train.config import LoRAConfig
from train.weights.lora import unet_on_meta

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one micro batch on one GPU, without the weights.

    kept: what the forward leaves for the backward.  peak: the most at any moment of forward and backward, gradients
    included.
    """

    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are made within it: `now` alive, and `peak`, the most at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def step_bytes(
    config: UNetConfig, micro_batch: int, precision: str, accumulated: bool, tokens: int = 77,
    lora: LoRAConfig | None = None, recompute: str = "none",
) -> Bytes:  # fmt: skip
    """Count the memory of a micro batch's forward and backward, for a net of any size, in seconds.

    Nothing is computed and no memory is taken.  precision: 'bf16' or 'fp32'.  recompute: one of model.config.RECOMPUTE.
    accumulated: the gradients of an earlier micro batch are there from the start; otherwise they appear as activations
    go.
    """
    unet = unet_on_meta(config, lora, recompute)
    with FakeTensorMode():
        _make_fake(unet, DTYPES[precision])
        before = 0
        if accumulated:
            for parameter in (p for p in unet.parameters() if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter)
                before += parameter.grad.untyped_storage().nbytes()
        step = walk_bytes(unet, inputs(config, micro_batch, tokens))
        return Bytes(step.kept, before + step.peak)


def inputs(config: UNetConfig, micro_batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and text_emb as the trainer gives them to the net, in fp32."""
    size = config.image_size
    x_t = torch.randn(micro_batch, config.in_channels, size, size)
    text_emb = torch.randn(micro_batch, tokens, config.encoder_dim)
    return x_t, torch.randint(1000, (micro_batch,)), text_emb


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that forward() leaves in memory while its result lives, without the result's own."""
    with LiveBytes() as live:
        result = forward()
        return live.now - result.untyped_storage().nbytes()


def walk_bytes(unet: UNet, args: tuple[Tensor, Tensor, Tensor]) -> Bytes:
    """Count the bytes that a forward and a backward allocate; the net's tensors are real or fake."""
    with LiveBytes() as live:
        out = unet(*args)
        kept = live.now - out.untyped_storage().nbytes()
        out.sum().backward()
    return Bytes(kept, live.peak)


def _make_fake(unet: UNet, dtype: torch.dtype) -> None:
    """Replace a net's meta tensors by fake CPU tensors, under which torch takes the same kernels as with real ones."""
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
