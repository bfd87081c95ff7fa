"""A real step on a rank, and the bytes of its real tensors: python -m tests.support.measured_step OUT OVERRIDES.

Run by tests/test_plan.py, one process a rank.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from model.unet import UNet
from train.compose import compose_config
from train.ema import EMA
from train.engine import Engine, build_engine, init_distributed
from train.monitor.step_memory import inputs


def size(tensors) -> int:
    """Bytes of the tensors among them."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def counted(name: str, into: dict[str, list[int]]) -> None:
    """List the bytes of the tensors that a collective of torch.distributed is given."""
    real = getattr(dist, name)
    into[name] = []

    def collective(*args, **kwargs):
        # The first is the result: the whole tensor.
        into[name].append(size([[*args, *kwargs.values()][0]]))
        return real(*args, **kwargs)

    setattr(dist, name, collective)


def allocated(action: Callable[[], Tensor | None]) -> tuple[int, int]:
    """Bytes that action() leaves allocated, without those of its result, and the most that there were at any moment.

    They come from the allocator's log of real memory, so they check both the plan's tensors without contents and its
    counter of storages. Memory that an operation frees before it ends is left out: it is scratch of this processor's
    kernels, which tells nothing about a GPU. Without AVX-512 oneDNN has no bf16 convolutions, and torch computes them
    with copies that take 30 % more. For the workspaces of a GPU's kernels the plan has a reserve.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = action()
    events: list[tuple[int, int, int, Any]] = []  # time, address, bytes (below 0 where freed), operation

    def collect(event: Any, operation: Any) -> None:
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, operation))
        elif operation is None and event.name.startswith("aten::"):
            operation = event  # the outermost: its kernels call others
        for child in event.children:
            collect(child, operation)

    for event in run.profiler.kineto_results.experimental_event_tree():
        collect(event, None)
    events.sort(key=lambda event: event[0])
    made: dict[int, tuple[int, Any]] = {}  # index and operation by address
    scratch: set[int] = set()
    for index, (_, address, size, operation) in enumerate(events):
        if size > 0:
            made[address] = index, operation
        elif address in made:
            first, maker = made.pop(address)
            if operation is not None and operation is maker:
                scratch |= {first, index}
    now = most = 0
    for index, (_, _, size, _) in enumerate(events):
        if index not in scratch:
            now += size
            most = max(most, now)
    return now - (result.untyped_storage().nbytes() if result is not None else 0), most


def main(out: str, *overrides: str) -> None:
    config = compose_config(list(overrides))
    sent: dict[str, list[int]] = {}
    for name in ("all_reduce", "all_gather_into_tensor"):  # DeepSpeed looks them up when it begins
        counted(name, sent)
    rank, ranks, _ = init_distributed()
    built: list[tuple[Engine, EMA]] = []

    def build() -> None:
        engine = build_engine(UNet(config.model, config.recompute), config, ranks)
        built.append((engine, EMA(engine, config.ema_decay)))

    found: dict[str, Any] = {"construction": allocated(build)[1]}
    engine, ema = built[0]
    unet = engine.model
    args = inputs(config.model, config.micro_batch, config.data.tokens)
    zero = engine.engine.optimizer
    for sizes in sent.values():
        sizes.clear()
    for _ in range(config.global_batch // (ranks * config.micro_batch)):
        found["backward"] = allocated(lambda: engine.backward(engine(*args).float().square().mean()))[1]
        # The last micro batch of a step leaves none: they are reduced, and the rank's part is kept elsewhere.
        found["gradients"] = max(found.get("gradients", 0), size(p.grad for p in unet.parameters()))
        engine.step()
    ema.update(engine, 1)
    found |= {
        "weights": size(zero.bit16_groups_flat),
        "master": size([engine.master]),
        "moments": size(engine.moments.values()),
        "ema": size([ema.average]),
        "bucket": zero.reduce_bucket_size * zero.bit16_groups_flat[0].element_size(),
        "parameters": sum(p.numel() for p in unet.parameters()),
    } | sent
    if config.optim.name == "adamw8bit":
        assert {t.dtype for t in engine.moments.values()} & {torch.uint8}, "the part is large enough for 8 bits"
    # The last rank's part of the gradients comes first, when most activations are there.
    backward = [None] * ranks
    dist.all_gather_object(backward, found["backward"])
    found["backward"] = max(backward)
    if rank == 0:
        # The net as the plan takes it: without DeepSpeed's hooks, and with weights of its own.
        bare = UNet(config.model, config.recompute).to(next(unet.parameters()).dtype)
        found["kept"] = allocated(lambda: bare(*args))[0]
        found["peak"] = allocated(lambda: bare(*args).sum().backward())[1]
        gradients = size(p.grad for p in bare.parameters())
        found["accumulated_peak"] = allocated(lambda: bare(*args).sum().backward())[1] + gradients
        Path(out).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
