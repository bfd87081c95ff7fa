"""Memory of one GPU by part, under ZeRO-1 as train/engine.py sets it up, and the largest micro batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.cost.step_cost import Bytes

FP32 = 4
# DeepSpeed's own: elements of the buffer through which gradients are reduced, and the multiple of the ranks to which
# the flat weights are padded (zero/config.py and stage_1_and_2.py of 0.19).
REDUCE_BUCKET = 500_000_000
ALIGNMENT = 2
# bitsandbytes': elements that share a scale, the tables of the two codes, and the smallest tensor that is coded.
BLOCK, CODE_TABLES, SMALLEST_8BIT = 256, 2 * 256 * FP32, 4096


@dataclass(frozen=True, slots=True)
class States:
    """Bytes that a rank holds between two steps.

    weights: of the whole net, frozen ones included.  master, moments, ema: of its own part, fp32 but for 8-bit moments.
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
    """Bytes that come and go in a step, on top of States: while gradients are made, reduced, and used."""

    backward: int
    reduction: int
    update: int

    @property
    def most(self) -> int:
        return max(self.backward, self.reduction, self.update)


def partition(trained: int, ranks: int) -> int:
    """Elements of a rank's part of the flat, padded parameters."""
    return -(-trained // (ALIGNMENT * ranks)) * ALIGNMENT


def moments_bytes(elements: int, optimizer: str) -> int:
    """Of the optimizer's state for a part of so many elements."""
    if optimizer == "adamw":
        return 2 * FP32 * elements + FP32  # and its step, a tensor
    if elements < SMALLEST_8BIT:
        return 2 * FP32 * elements
    return 2 * elements + 2 * FP32 * -(-elements // BLOCK) + CODE_TABLES


def states(trained: int, ranks: int, optimizer: str, weight_bytes: int, frozen: int = 0) -> States:
    """What stays on a rank.

    trained, frozen: parameters that have an optimizer, and those that only run, as under LoRA.
    """
    part = partition(trained, ranks)
    weights = weight_bytes * (part * ranks + frozen)
    return States(weights, FP32 * part, moments_bytes(part, optimizer), FP32 * part)


def peak(step: Bytes, trained: int, ranks: int, weight_bytes: int) -> Peak:
    """What a step adds to that.

    The bucket lives from the first gradient on; a full one is copied for the all-reduce. The update has all gradients
    of a rank that is alone, else its part, and a copy of that in fp32.
    """
    gradients, bucket = weight_bytes * trained, weight_bytes * REDUCE_BUCKET
    part = partition(trained, ranks)
    return Peak(
        backward=step.peak + bucket,
        reduction=gradients + bucket + min(gradients, bucket),
        update=gradients + (weight_bytes + 2 * FP32) * part,
    )


def most_that_fits(needs: Callable[[int], int], first: int, room: float) -> int:
    """The largest n with needs(n) <= room, 0 if there is none; beyond 100 to within a hundredth.

    needs: grows with n along straight pieces that get steeper. It is slow, so a line through the two last values asked
    for gives the next n.
    """
    asked = {first: needs(first)}
    fits, too_many, guess = 0, None, 8 * first
    if asked[first] <= room:
        fits = first
    else:
        too_many, guess = first, first // 2
    while too_many is None or too_many - fits > max(1, fits // 100):
        guess = max(guess, fits + 1)
        if too_many is not None:
            guess = min(guess, too_many - 1)
        asked[guess] = needs(guess)
        if asked[guess] <= room:
            fits = guess
        else:
            too_many = guess
        (a, of_a), (b, of_b) = list(asked.items())[-2:]
        slope = (of_b - of_a) / (b - a)
        guess = int(b + (room - of_b) / slope) if slope > 0 else 2 * guess
    return fits
