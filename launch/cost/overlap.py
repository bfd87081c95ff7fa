"""How much of the all-reduce of the gradients hides behind the backward, bucket by bucket."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.monitor.flops import Flops
from train.monitor.memory import BUCKETS


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are all-reduced together.

    elements: of them.  ready: the share of the backward, in FLOP, after which they are handed over.
    """

    elements: int
    ready: float


def fill_buckets(flops: Flops, capacity: int, compiled: bool) -> list[Bucket]:
    """The buckets of a backward, as DeepSpeed fills them: one is handed over when the next gradient has no room in it.

    The last one is handed over at the end of the backward.
    capacity: elements that a bucket holds, at least those of the largest parameter.
    compiled: whether the parts of the net are compiled, each by itself. All gradients of a part then come at its end.
    """
    ready = [gradient.flops for gradient in flops.gradients]
    if compiled:
        parts = [compiled_part(gradient.name) for gradient in flops.gradients]
        ends = dict(zip(parts, ready, strict=True))  # that of a part's last gradient
        ready = [ends[part] for part in parts]
    in_order = sorted(zip(ready, flops.gradients, strict=True), key=lambda pair: pair[0])  # stable
    buckets, elements = [], 0
    for at, gradient in in_order:
        if elements and elements + gradient.elements > capacity:
            buckets.append(Bucket(elements, at / flops.backward))
            elements = 0
        elements += gradient.elements
    return [*buckets, Bucket(elements, 1.0)]


def compiled_part(parameter: str) -> str:
    """The part of the net that torch.compile makes one function of: see UNet.compile_stages."""
    first, second, *_ = parameter.split(".")
    if first in ("input_blocks", "output_blocks"):
        return f"{first}.{second}"
    return first.split("_")[0]  # encoder_proj and encoder_pooling are one


def exposed_seconds(
    ready: Sequence[float], sizes: Sequence[float], rate: float, efficiency: float = 1.0, buffers: int = BUCKETS
) -> float:
    """Seconds from the end of a backward that has no network to wait for to the end of the last bucket's all-reduce.

    The link sends the buckets one after another. The backward can fill a bucket's memory again when all of it is sent:
    with two buckets it waits, each time one is full, until the one before is sent.
    Source: average_tensor in DeepSpeed's stage_1_and_2.py, where the stream of the backward waits for that of the
    all-reduces each time.

    ready: seconds from the start of the backward to when it would hand over each bucket without waiting; the last at
    its end.  sizes: bytes that a rank sends for each.  rate: bytes/s of the link.  efficiency: the share of it that
    is reached.  buffers: buckets that there is memory for, 2 or more; with one more than are sent there is no wait.
    """
    waited, ends = 0.0, [0.0]  # ends[n]: when n buckets are sent
    for sent, (at, size) in enumerate(zip(ready, sizes, strict=True)):
        free = ends[max(0, sent + 2 - buffers)]
        waited = max(waited, free - at)
        ends.append(max(at + waited, ends[-1]) + size / (rate * efficiency))
    return ends[-1] - ready[-1]
