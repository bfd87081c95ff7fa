"""Memory of one GPU by part, under ZeRO-1 as train/engine.py sets it up, and the largest micro batch that fits."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from train.adam_state import FP32, moments_bytes
from train.config import Config
from train.monitor.step_memory import Bytes
from train.weights.lora import unet_on_meta
from train.weights.power_average import TRACKED

WEIGHT_BYTES = {"bf16": 2, "fp32": FP32}
# DeepSpeed's own: the buckets of the all-reduce, which take turns, and the multiple of the ranks to which it pads the
# flat weights. Source: stage_1_and_2.py of DeepSpeed 0.19. A bucket holds the largest parameter: train/engine.py.
BUCKETS = 2
ALIGNMENT = 2


@dataclass(frozen=True, slots=True)
class States:
    """Bytes that a rank holds between two steps.

    weights: of the whole net, with those that are frozen.  master, moments, ema: of the rank's part, in fp32 but for
    8-bit moments; ema: all averages.
    """

    weights: int
    master: int
    moments: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.master + self.moments + self.ema


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that a step adds to States: during the backward, with its all-reduces, and during the update."""

    backward: int
    update: int

    @property
    def most(self) -> int:
        return max(self.backward, self.update)


def partition(trained: int, ranks: int) -> int:
    """Elements of a rank's part of the flat, padded parameters."""
    return -(-trained // (ALIGNMENT * ranks)) * ALIGNMENT


def states(
    trained: int, ranks: int, optimizer: str, weight_bytes: int, frozen: int = 0, averages: int = 1
) -> States:  # fmt: skip
    """What a rank holds between two steps.

    trained, frozen: numbers of parameters; under LoRA the net is frozen.  weight_bytes: bytes of a weight.
    averages: of the weights, as averages_of gives them.
    """
    part = partition(trained, ranks)
    weights = weight_bytes * (part * ranks + frozen)
    return States(weights, FP32 * part, moments_bytes(part, optimizer), averages * FP32 * part)


def averages_of(config: Config) -> int:
    """How many averages of the weights a training keeps."""
    return 1 + len(TRACKED) if config.ema_snapshot_every else 1


def snapshot_bytes(trained: int, ranks: int) -> int:
    """Bytes of a rank's part of a snapshot of the power-function averages, in half precision."""
    return FP32 // 2 * len(TRACKED) * partition(trained, ranks)


def peak(step: Bytes, trained: int, ranks: int, weight_bytes: int, largest: int) -> Peak:
    """What a step adds to that.

    From the last micro batch's first gradient on there are the buckets and room for the gradients of the rank's part,
    which may begin and end within a parameter. The update holds those too, the part of them, and that twice in fp32.
    largest: elements of the largest parameter that is trained.
    """
    part = partition(trained, ranks)
    reducing = weight_bytes * (BUCKETS * largest + min(trained, part + 2 * largest))
    return Peak(backward=step.handed_over + reducing, update=reducing + (weight_bytes + 2 * FP32) * part)


def construction(trained: int, ranks: int, weight_bytes: int, frozen: int = 0) -> int:
    """The most bytes of a rank before its first step.

    The net is made in fp32 and rounded to the working precision. DeepSpeed then copies the trained weights into one
    tensor, frees them, and makes masters of the rank's part and for a moment as large a gradient.
    """
    part = partition(trained, ranks)
    made = FP32 * (trained + frozen)
    flat = weight_bytes * (part * ranks + frozen)
    return max(made, flat + weight_bytes * trained, flat + 2 * FP32 * part)


def largest_parameter(config: Config) -> int:
    """Elements of the largest parameter that is trained, and so of a bucket of the all-reduce."""
    return max(p.numel() for p in unet_on_meta(config.model, config.lora).parameters() if p.requires_grad)


def most_that_fits(bytes_needed: Callable[[int], int], available: float) -> int:
    """The largest n with bytes_needed(n) <= available, 0 if there is none; bytes_needed grows with n."""
    too_many = 1
    while bytes_needed(too_many) <= available:
        too_many *= 2
    return bisect_right(range(1, too_many), available, key=bytes_needed)
