"""The memory that a rank of a run will need, beside what this machine has: what dry_run says of it."""

import os
from pathlib import Path

import torch

from data.device import ranks_of_node, uses_gpu
from data.loader.workers import PREFETCH, SAMPLES_PER_MESSAGE
from train.config import Config, accumulation
from train.monitor.memory import (
    WEIGHT_BYTES,
    averages_of,
    construction,
    largest_parameter,
    peak,
    snapshot_bytes,
    states,
)
from train.monitor.step_memory import step_bytes

GB = 1e9
# Resident memory of a rank before it has a net, and of a loader worker beside what it shares with its rank: of Python,
# torch, deepspeed and diffusers on a CPU, measured with train/monitor/metrics.py's `memory_gb`.
PROCESS_BYTES, WORKER_BYTES = 600_000_000, 100_000_000
# Of the control groups, version 2 and 1: the limit of a container or a batch job, and what is used of it.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def describe_memory(config: Config, ranks: int, trained: int, frozen: int) -> dict[str, str]:
    """What a rank needs and what there is, by kind of memory: of the GPU and of the host, or on a CPU of the host.

    trained, frozen: numbers of parameters.
    """
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    on_gpu = uses_gpu() or (config.needs_gpu and not on_cpu)  # what needs a GPU is looked at where there is none, too
    device, host = needed_bytes(config, ranks, trained, frozen, on_gpu)
    of_this_node = ranks_of_node()
    available = available_bytes()
    lines = {}
    if on_gpu and not uses_gpu():
        lines["GPU memory"] = f"about {device / GB:.1f} GB per rank, beside CUDA's own; this machine has no GPU"
    elif on_gpu:
        free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
        of = f"{free / GB:.1f} of {total / GB:.1f} GB are free"
        lines["GPU memory"] = f"about {device / GB:.1f} GB per rank; {of}{_verdict(device, free)}"
    else:
        host += device
    together = f", {of_this_node * host / GB:.1f} GB for the {of_this_node} ranks here" if of_this_node > 1 else ""
    lines["host memory"] = (
        f"about {host / GB:.1f} GB per rank{together}; {available / GB:.1f} GB are free here"
        f"{_verdict(of_this_node * host, available)}"
    )
    return lines


def needed_bytes(config: Config, ranks: int, trained: int, frozen: int, on_gpu: bool) -> tuple[int, int]:
    """Bytes that a rank needs for the net and its step, and beside that on the host: libraries, loader, checkpoint."""
    weight_bytes = WEIGHT_BYTES[config.precision]
    held = states(trained, ranks, config.optim.name, weight_bytes, frozen, averages_of(config))
    accumulated = accumulation(config, ranks) > 1
    step = step_bytes(
        config.model, config.micro_batch, config.precision, accumulated, config.data.tokens, config.lora,
        config.recompute,
    )  # fmt: skip
    # A GPU holds whole buckets of gradients. A host holds the pages of them that were written, the gradients at most.
    on_device = peak(step, trained, ranks, weight_bytes, largest_parameter(config)).most
    most = on_device if on_gpu else step.peak + 2 * weight_bytes * trained
    pixels = config.model.image_size**2 + config.model.low_res_size**2
    sample = 3 * pixels + 4 * config.data.tokens * config.model.encoder_dim
    # Each worker is some messages ahead and writes the next one; a message has one micro batch or more.
    loaded = config.data.workers * (PREFETCH + 1) * max(SAMPLES_PER_MESSAGE, config.micro_batch) * sample
    # A snapshot may be due with it.
    snapshot = snapshot_bytes(trained, ranks) if config.ema_snapshot_every else 0
    checkpoint = held.master + held.moments + held.ema + snapshot
    beside = PROCESS_BYTES + config.data.workers * WORKER_BYTES + int(config.text.cache_gb * GB)
    built = construction(trained, ranks, weight_bytes, frozen)
    return max(held.total + most, built), beside + loaded + checkpoint


def available_bytes() -> int:
    """Bytes of host memory that can still be used: of the machine, or of the container or job if that has fewer."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii").split()
    available = int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024
    for limit, used in CGROUPS:
        try:
            left = int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such group, or its limit is the word "max"
            continue
        available = min(available, max(0, left))
    return available


def _verdict(needed: float, available: float) -> str:
    return "" if needed <= available else ": TOO LITTLE; lower micro_batch, set recompute=blocks, or take more ranks"
