"""What one micro batch costs, of the real net on tensors without contents: bytes and floating-point operations."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model.config import UNetConfig
from model.unet import UNet
from train.config import LoRAConfig
from train.weights.lora import add_lora

ATEN = torch.ops.aten
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# torch counts the attention of CUDA and not that of the CPU, on which the net is walked here.
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True, slots=True)
class Bytes:
    """Of one micro batch on one GPU, without the weights.

    kept: what the forward leaves for the backward.  peak: the most at any moment of forward and backward, gradients
    included.
    """

    kept: int
    peak: int


@dataclass(frozen=True, slots=True)
class Flops:
    """Of matmuls, convolutions and attention for one image, a multiplication and an addition being two.

    forward: of the forward.  done: of forward and backward, with what is computed again.
    """

    forward: int
    done: int

    @property
    def model(self) -> int:
        """As MFU counts them: three times the forward, whatever is computed again."""
        return 3 * self.forward


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made within it: those alive now, and the most there were at any moment."""

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
    """Of a net of any size, in seconds; nothing is computed and no memory is taken.

    accumulated: with the gradients of an earlier micro batch there; without, they grow while activations go.
    """
    with _fake(precision):
        unet = UNet(config, recompute)
        if lora and lora.rank:
            _add_fake_lora(unet, lora)
        before = 0
        if accumulated:
            for parameter in (p for p in unet.parameters() if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter)
                before += parameter.grad.untyped_storage().nbytes()
        found = walk_bytes(unet, inputs(config, micro_batch, tokens))
        return Bytes(found.kept, before + found.peak)


def image_flops(config: UNetConfig, tokens: int = 77, recompute: str = "none") -> Flops:
    """Of a net of any size, in seconds."""
    with _fake("fp32"):
        return walk_flops(UNet(config, recompute), inputs(config, 1, tokens))


def inputs(config: UNetConfig, micro_batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and text_emb as the trainer gives them, in fp32."""
    size = config.image_size
    x_t = torch.randn(micro_batch, config.in_channels, size, size, dtype=torch.float32)
    text_emb = torch.randn(micro_batch, tokens, config.encoder_dim, dtype=torch.float32)
    return x_t, torch.randint(1000, (micro_batch,)), text_emb


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that forward() leaves in memory while its result lives, the result's own left out."""
    with LiveBytes() as live:
        result = forward()
        return live.now - result.untyped_storage().nbytes()


def walk_bytes(unet: UNet, args: tuple[Tensor, Tensor, Tensor]) -> Bytes:
    """Of what a forward and a backward make, whether the net's tensors have contents or not."""
    with LiveBytes() as live:
        out = unet(*args)
        kept = live.now - out.untyped_storage().nbytes()
        out.sum().backward()
    return Bytes(kept, live.peak)


def walk_flops(unet: UNet, args: tuple[Tensor, Tensor, Tensor]) -> Flops:
    """Of an image of the batch, whether the net's tensors have contents or not."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        out = unet(*args)
        forward = counter.get_total_flops()
        out.sum().backward()
    return Flops(forward // len(args[0]), counter.get_total_flops() // len(args[0]))


def _add_fake_lora(unet: UNet, lora: LoRAConfig) -> None:
    """As add_lora, for a net of fake parameters: peft converts what it makes, which those can't be."""
    with unset_fake_temporarily(), torch.device("meta"):
        pattern = UNet(unet.config)
        add_lora(pattern, lora)
    unet.requires_grad_(False)
    for name, layer in list(pattern.named_modules()):
        if hasattr(layer, "lora_A"):
            for part in (layer.lora_A.default, layer.lora_B.default):
                part.weight = nn.Parameter(torch.empty(part.weight.shape))
            layer.base_layer = unet.get_submodule(name)
            unet.set_submodule(name, layer)


@contextmanager
def _fake(precision: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])  # fake parameters can't be converted
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)
