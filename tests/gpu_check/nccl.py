"""NCCL on one rank: the collectives that the trainer uses run and return what they should."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from tests.gpu_check.check import Check, Row, attempt, needs_gpu, planned, verdict

NUMBERS = 1 << 20


def run(check: Check) -> Iterator[Row]:
    """A row for each collective; on a CPU gloo takes NCCL's place."""
    backend = "nccl" if check.on_gpu else "gloo"
    collectives = {"all_reduce": all_reduce, "all_gather": all_gather, "broadcast": broadcast}
    yield from planned(collectives)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, collective in collectives.items():
            yield attempt(name, lambda name=name, collective=collective: row(name, check, backend, collective))
    finally:
        dist.destroy_process_group()
    if not check.on_gpu:
        yield needs_gpu("nccl", "the rows above are gloo's")


def row(name: str, check: Check, backend: str, collective) -> Row:
    """On float32 and bfloat16."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.randn(NUMBERS, device=check.device).to(dtype)
        if not torch.equal(collective(value), value):
            wrong.append(str(dtype))
    text = f"{backend}, one rank, float32 and bfloat16"
    return verdict(name, not wrong, f"{text}: wrong in {', '.join(wrong)}" if wrong else text)


def all_reduce(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, asynchronous, as in a backward."""
    found = value.clone()
    work = dist.all_reduce(found, async_op=True)
    assert work
    work.wait()
    return found


def all_gather(value: torch.Tensor) -> torch.Tensor:
    """What all ranks have, one after another."""
    found = torch.empty_like(value)
    dist.all_gather_into_tensor(found, value)
    return found


def broadcast(value: torch.Tensor) -> torch.Tensor:
    """What the first rank has."""
    found = value.clone()
    dist.broadcast(found, src=0)
    return found
