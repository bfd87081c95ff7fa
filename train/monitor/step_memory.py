"""The memory of one micro batch, of the real net on tensors without contents."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import UNetConfig
from model.unet import UNet
from train.config import LoRAConfig
from train.weights.lora import unet_on_meta

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The micro batch of a walk over tensors without contents. No tensor that is independent of the batch has so many bytes.
# So a tensor's bytes divided by it give those of an image, and the remainder is what does not depend on the batch.
IMAGES = 10**10


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one micro batch on one GPU, without the weights.

    kept: what the forward leaves for the backward.  peak: the most at any moment of forward and backward, gradients
    included.  handed_over: the most where a gradient that is ready goes into a bucket and its own memory is freed.
    """

    kept: int
    peak: int
    handed_over: int


class LiveBytes(TorchDispatchMode):
    """Storages that are made within it: their bytes as they come and, below 0, as they go; `now`, those alive."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self.seen: weakref.WeakSet = weakref.WeakSet()

    @property
    def now(self) -> int:
        return sum(self.changes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [tensor.untyped_storage() for tensor in _tensors(result)]
        made = [storage for storage in made if storage not in self.seen]
        if made:  # or views of what is given, and was there before
            given = {id(tensor.untyped_storage()) for tensor in _tensors((*args, *(kwargs or {}).values()))}
            for storage in made:
                if id(storage) not in given:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        self.seen.add(storage)
        size = storage.nbytes()
        self.changes.append(size)
        weakref.finalize(storage, self.changes.append, -size)


def _tensors(value: Any) -> Iterator[Tensor]:
    """A tensor, or those in a list or tuple, as operations take and return them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True, slots=True)
class Walk:
    """A forward and a backward as changes of the bytes that are alive.

    changes: bytes that come, or go below 0.  forward: the number of changes in the forward.  out: bytes of its result.
    gradients: bytes of the gradients that are ready at each change.  all_gradients: in the end.
    """

    changes: np.ndarray
    forward: int
    out: int
    gradients: np.ndarray
    all_gradients: int

    def bytes(self, micro_batch: int, accumulated: bool = False) -> Bytes:
        """Of a micro batch of any size, where the walk was one of IMAGES.

        accumulated: the gradients of an earlier micro batch are there from the start; otherwise they appear as
        activations go.
        """
        live = np.cumsum(_resized(self.changes, micro_batch))
        kept = int(live[self.forward - 1] - _resized(np.array(self.out), micro_batch))
        # A gradient that is ready is added to the one that is there, or copied into a bucket, and freed.
        freed = int((live - self.gradients).max())
        if accumulated:
            return Bytes(kept, freed + self.all_gradients, freed + self.all_gradients)
        return Bytes(kept, int(live.max()), freed)


def _resized(sizes: np.ndarray, micro_batch: int) -> np.ndarray:
    """Bytes at this micro batch of what has `sizes` at a micro batch of IMAGES."""
    fixed = np.fmod(sizes, IMAGES)
    return fixed + micro_batch * ((sizes - fixed) // IMAGES)


def walk_step(
    config: UNetConfig, precision: str, tokens: int = 77, lora: LoRAConfig | None = None, recompute: str = "none"
) -> Walk:
    """Walk once over a net of any size, in seconds, for all micro batches; nothing is computed, no memory is taken.

    precision: 'bf16' or 'fp32'.  recompute: one of model.config.RECOMPUTE.
    """
    unet = unet_on_meta(config, lora, recompute)
    with FakeTensorMode():
        _make_fake(unet, DTYPES[precision])
        return walk(unet, inputs(config, IMAGES, tokens))


def step_bytes(
    config: UNetConfig, micro_batch: int, precision: str, accumulated: bool, tokens: int = 77,
    lora: LoRAConfig | None = None, recompute: str = "none",
) -> Bytes:  # fmt: skip
    """The memory of one micro batch's forward and backward; arguments as in walk_step and Walk.bytes."""
    return walk_step(config, precision, tokens, lora, recompute).bytes(micro_batch, accumulated)


def inputs(config: UNetConfig, micro_batch: int, tokens: int) -> tuple[Tensor, ...]:
    """x_t, t and text_emb as the trainer gives them to the net, in fp32; then low_res and aug_t if it enlarges."""
    size = config.image_size
    x_t, t = torch.randn(micro_batch, config.in_channels, size, size), torch.randint(1000, (micro_batch,))
    text_emb = torch.randn(micro_batch, tokens, config.encoder_dim)
    if not config.low_res_size:
        return x_t, t, text_emb
    return x_t, t, text_emb, torch.randn_like(x_t), torch.randint_like(t, 1000)


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that forward() leaves in memory while its result lives, without the result's own."""
    with LiveBytes() as live:
        result = forward()
        return live.now - result.untyped_storage().nbytes()


def walk(unet: UNet, args: tuple[Tensor, ...]) -> Walk:
    """Record what a forward and a backward allocate; the net's tensors are real or fake."""
    gradients = [(0, 0)]  # the number of changes before a gradient is ready, and the bytes of those that are
    with LiveBytes() as live:

        def ready(parameter: Tensor) -> None:
            gradients.append((len(live.changes), gradients[-1][1] + parameter.nbytes))

        handles = [p.register_post_accumulate_grad_hook(ready) for p in unet.parameters() if p.requires_grad]
        out = unet(*args)
        forward, size = len(live.changes), out.untyped_storage().nbytes()
        out.sum().backward()
        changes = np.array(live.changes)
    for handle in handles:
        handle.remove()
    begins, ready_bytes = np.array(gradients).T
    by_change = ready_bytes[np.searchsorted(begins, np.arange(len(changes)), side="right") - 1]
    return Walk(changes, forward, size, by_change, gradients[-1][1])


def walk_bytes(unet: UNet, args: tuple[Tensor, ...]) -> Bytes:
    """Bytes of a forward and backward of real tensors."""
    walked = walk(unet, args)
    live = np.cumsum(walked.changes)
    kept = int(live[walked.forward - 1]) - walked.out
    return Bytes(kept, int(live.max()), int((live - walked.gradients).max()))


def _make_fake(unet: UNet, dtype: torch.dtype) -> None:
    """Replace a net's meta tensors by fake CPU tensors, under which torch takes the same kernels as with real ones."""
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
