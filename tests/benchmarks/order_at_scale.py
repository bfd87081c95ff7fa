"""The plan of 512 ranks x 4 workers over 120,000 shards, no pixels: `python -m tests.benchmarks.order_at_scale`.

Prints how long planning takes and what memory a worker's plan needs. With full=true it also walks a whole epoch as all
the workers together do, some minutes, and counts how often each of the samples comes.
"""

import resource
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np

from data.cli import command
from data.loader.order import Order
from data.progress import each
from data.storage.shards import Shard
from tests.benchmarks.places import samples_at

SHARDS, RANKS, WORKERS, GLOBAL_BATCH, MICRO_BATCH = 120_000, 512, 4, 3072, 6
STREAMS, PHASES, BLOCK = 3072, 4, 43
# So the epoch's seams lie inside batches, as they do after a real download.
EPOCH = 1


def shard_counts() -> list[int]:
    """9,000 to 10,000 samples a shard, as after failed downloads, and every thousandth shard empty."""
    counts = np.random.default_rng(0).integers(9_000, 10_001, SHARDS)
    counts[::1000] = 0
    return counts.tolist()


def positions_of_worker(order: Order, epoch: int, rank: int, worker: int) -> np.ndarray:
    """The positions of an epoch that a loader worker of a rank makes, in its order (data/loader/stream.py)."""
    batch, per_step = order.global_batch, order.global_batch // (RANKS * MICRO_BATCH)
    first, end = epoch * order.samples, (epoch + 1) * order.samples
    units = np.arange(first // batch * per_step, (-(-end // batch)) * per_step)
    units = units[units % WORKERS == worker]
    slot = rank * (batch // RANKS) + units % per_step * MICRO_BATCH
    positions = ((units // per_step * batch + slot)[:, None] + np.arange(MICRO_BATCH)).reshape(-1)
    return positions[(positions >= first) & (positions < end)]


def timed(label: str, function, times: int = 1):
    """Print how long a call takes, and return what it returned last."""
    start = time.perf_counter()
    for _ in range(times):
        result = function()
    print(f"{label:62} {(time.perf_counter() - start) / times * 1e3:10.3f} ms")
    return result


def plan_micro_batch(order: Order, step: int, rank: int) -> None:
    """What a worker does for a micro batch before it reads anything, the rows of its blocks included."""
    for slot in range(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH):
        block, _ = order.locate(step, slot)
    order.rows(block)


def plan_many(order: Order, step: int, rank: int, micro_batches: int) -> None:
    """As the loader does it: rows() only when a new block begins."""
    last = None
    for turn in range(micro_batches):
        for slot in range(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH):
            block, _ = order.locate(step + turn * WORKERS, slot)
            if block != last:
                order.rows(block)
                last = block


def resident() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(counts: list[int]) -> None:
    """Times and memory of one worker."""

    def new() -> Order:
        return Order(0, counts, GLOBAL_BATCH, STREAMS, PHASES, BLOCK)

    order = timed("Order built", new)
    steps = order.samples // GLOBAL_BATCH
    timed("plan of a worker's first micro batch, step 0", lambda: plan_micro_batch(order, 0, 100))
    timed(
        "same in the middle of epoch 7, a fresh Order", lambda: plan_micro_batch(new(), steps * 15 // 2, 100), times=10
    )
    timed("same, next step (the epoch's line is known)", lambda: plan_micro_batch(order, WORKERS, 100), times=100)
    timed("1,000 micro batches of one worker, blocks included", lambda: plan_many(order, 0, 100, 1000))

    tracemalloc.start()
    order = new()
    for epoch in (0, 1):
        plan_micro_batch(order, epoch * (steps + 1), 100)
    print(f"{'a worker holds, two epochs at once':62} {tracemalloc.get_traced_memory()[0] / 2**20:10.1f} MB")
    print(f"{'  at most, while planning':62} {tracemalloc.get_traced_memory()[1] / 2**20:10.1f} MB")
    before = tracemalloc.get_traced_memory()[0]
    shards = [Shard(f"datasets/laion/shards/{n:05d}.tar", count) for n, count in enumerate(counts)]
    paths = (tracemalloc.get_traced_memory()[0] - before) / 2**20
    print(f"{f'the list of the {len(shards):,} shards (paths and counts)':62} {paths:10.1f} MB")
    tracemalloc.stop()


def walk_epoch(order: Order) -> None:
    """Walk an epoch with all workers of all ranks and count the samples."""
    seen = np.zeros(order.samples, dtype=np.uint8)
    walked = 0
    for rank in each(range(RANKS), "epoch", "rank"):
        for worker in range(WORKERS):
            samples = samples_at(order, positions_of_worker(order, EPOCH, rank, worker))
            # A sample that came twice to one worker would count once here: then another is never seen.
            seen[samples] += 1
            walked += len(samples)
    never, once = (int(np.count_nonzero(seen == times)) for times in (0, 1))
    print(f"epoch {EPOCH}: {walked:,} positions, {once:,} samples seen once, {never:,} never")
    assert walked == once == order.samples, "not every sample came exactly once"


@dataclass
class OrderAtScale:
    """Prints how long planning takes and what memory a worker's plan needs.

    full: walk a whole epoch too, which takes minutes.
    """

    full: bool = False


def plan_at_scale(args: OrderAtScale) -> None:
    """Print times and memory."""
    counts = shard_counts()
    print(f"{RANKS} ranks x {WORKERS} workers, {SHARDS:,} shards, {sum(counts):,} samples")
    before = resident()
    measure(counts)
    print(f"{'the process: memory before and after':62} {before:10.0f} MB {resident():.0f} MB")
    if args.full:
        order = Order(0, counts, GLOBAL_BATCH, STREAMS, PHASES, BLOCK)
        start = time.process_time()
        walk_epoch(order)
        print(f"walked in {time.process_time() - start:.0f} s of one core, {resident():.0f} MB")


def main(argv: list[str] | None = None) -> None:
    command(plan_at_scale, OrderAtScale, argv)


if __name__ == "__main__":
    main()
