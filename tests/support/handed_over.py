"""When a backward of the real engine hands its gradients over to the all-reduce."""

import time
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from train.engine import Engine


@dataclass(slots=True)
class Record:
    """One backward.

    buckets: the bytes of each all-reduce, and the seconds of processor time before it.  end: those before the last
    gradient.  inside: the share of the bytes handed over before that.
    """

    buckets: list[tuple[float, int]]
    end: float
    inside: float

    def share(self, moment: float) -> float:
        """The share of all bytes handed over by this share of the time."""
        total = sum(size for _, size in self.buckets)
        return sum(size for at, size in self.buckets if at <= moment * self.end) / total


def handed_over(engine: Engine, loss: Tensor) -> Record:
    """Run the backward of a loss; the record has no buckets where gradients are only accumulated."""
    buckets: list[tuple[float, int]] = []
    ends: list[float] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args, **kwargs):
        buckets.append((time.process_time() - start, tensor.nbytes))
        return real(tensor, *args, **kwargs)

    def gradient(parameter: Tensor) -> None:
        ends.append(time.process_time() - start)

    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(gradient) for p in parameters]
    start = time.process_time()
    dist.all_reduce = all_reduce
    try:
        engine.backward(loss)
    finally:
        dist.all_reduce = real
        for handle in handles:
            handle.remove()
    end = max(ends)
    total = sum(size for _, size in buckets)
    inside = sum(size for at, size in buckets if at < end) / total if total else 0.0
    return Record(buckets, end, inside)
