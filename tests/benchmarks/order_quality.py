"""How well the order mixes: the tables of docs/measurements/order.md.

    python -m tests.benchmarks.order_quality picture=FILE.png

Measured: how far two samples that lie next to each other in a shard come apart in the sequence, how often they share a
batch, from how many shards a batch is taken, and how much of it comes together again in the next epoch. Beside it stand
an even shuffle of all samples, and webdataset's own buffer in each worker, with the shards shuffled before.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from webdataset.filters import _shuffle

from data.cli import command, location
from data.loader.order import Order
from tests.benchmarks.places import positions_of, samples_at

PAIRS, BATCHES = 20_000, 40
# A JPEG of 256 px, and an embedding of T5-v1_1-xxl in float16.
SAMPLE_MB = 0.03 + 0.63
EVEN = "even shuffle"
SHARDS, SHARD_SIZE = 120_000, 10_000
GLOBAL_BATCH, RANKS, WORKERS = 3072, 512, 4


@dataclass
class OrderQuality:
    """Prints how well the order mixes samples.

    picture: a .png to draw the table at scale to.
    """

    picture: str = location("")


@dataclass
class Mixing:
    """What was measured of one way to shuffle.

    apart [PAIRS]: positions between neighbours.  same_batch: share of neighbours.  shards: in one batch, the mean.
    again: share of the pairs of a batch that share a batch in the next epoch, nan where not measured.
    held: samples in a worker's memory.  steps_of_shard [rows]: the step of each row of one shard, from its first on.
    """

    name: str
    apart: np.ndarray
    same_batch: float
    shards: float
    again: float
    held: float
    steps_of_shard: np.ndarray = field(default_factory=lambda: np.zeros(0))


def ours(name: str, order: Order, workers: int) -> Mixing:
    """Measure an order; workers: all loader workers of all ranks."""
    rng = np.random.default_rng(0)
    filled = np.flatnonzero(order.counts > 1)
    shard = rng.choice(filled, PAIRS)
    first = order.first_index[shard] + rng.integers(0, order.counts[shard] - 1)
    places = positions_of(order, 0, np.concatenate([first, first + 1]))
    one, other = places[:PAIRS], places[PAIRS:]
    batch = order.global_batch
    shards, again = [], []
    for step in rng.integers(0, order.samples // batch, BATCHES):
        samples = samples_at(order, step * batch + np.arange(batch))
        shards.append(len(np.unique(np.searchsorted(order.first_index, samples, side="right"))))
        together = np.unique(positions_of(order, 1, samples) // batch, return_counts=True)[1]
        again.append((together * (together - 1)).sum() / (batch * (batch - 1)))
    middle = int(filled[len(filled) // 2])
    rows = order.first_index[middle] + np.arange(order.counts[middle])
    steps = positions_of(order, 0, rows) // batch
    pieces = order.streams * order.phases
    held = pieces * min(order.block_size, order.samples / pieces) / workers
    same = float((one // batch == other // batch).mean())
    return Mixing(
        name, abs(one - other), same, float(np.mean(shards)), float(np.mean(again)), held, steps - steps.min()
    )


def even(samples: int, shards: int, batch: int) -> Mixing:
    """A uniform permutation of all samples: what no reader of shards can have, since each sample is a seek."""
    rng = np.random.default_rng(0)
    apart = abs(rng.integers(0, samples, PAIRS) - rng.integers(0, samples, PAIRS))
    share = (batch - 1) / (samples - 1)
    return Mixing(EVEN, apart, share, shards * (1 - (1 - 1 / shards) ** batch), share, samples)


def webdataset(buffer: int) -> Mixing:
    """One worker's own shards through webdataset's shuffle(buffer); the other workers do the same side by side."""
    own = SHARDS // (RANKS * WORKERS)
    stream = _shuffle(iter(range(own * SHARD_SIZE)), buffer, buffer, rng=random.Random(0))
    sequence = np.fromiter(stream, dtype=np.int64)
    micro = GLOBAL_BATCH // RANKS
    turn = np.argsort(sequence)
    step = turn // micro * WORKERS
    position = step * GLOBAL_BATCH + turn % micro
    first = np.random.default_rng(0).integers(0, own * SHARD_SIZE - 1, PAIRS)
    first = first[first % SHARD_SIZE < SHARD_SIZE - 1]
    same = float((step[first] == step[first + 1]).mean())
    whole = sequence[: len(sequence) // micro * micro].reshape(-1, micro) // SHARD_SIZE
    shards = float(np.mean([len(set(group)) for group in whole[::50].tolist()])) * RANKS
    of_one = step[own // 2 * SHARD_SIZE : (own // 2 + 1) * SHARD_SIZE]
    apart = abs(position[first] - position[first + 1])
    return Mixing(f"webdataset, buffer {buffer:,}", apart, same, shards, float("nan"), buffer, of_one - of_one.min())


def table(rows: list[Mixing], batch: int, workers_a_node: int = 0) -> None:
    """Print the rows as Markdown, distances in batches; with a node's workers also what they hold together."""
    last = ["held a node"] if workers_a_node else []
    titles = [
        "order",
        "apart: median",
        "1 % are within",
        "same batch",
        "shards a batch",
        "again",
        "held a worker",
        *last,
    ]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for m in rows:
        median, least = np.quantile(m.apart / batch, [0.5, 0.01])
        again = "" if np.isnan(m.again) else f"{m.again:.2g}"
        cells = [m.name, f"{median:,.1f}", f"{least:,.2f}", f"{m.same_batch:.2g}", f"{m.shards:,.0f}", again]
        cells.append("all" if m.name == EVEN else f"{m.held:,.0f}")
        if workers_a_node:
            cells.append("" if m.name == EVEN else f"{m.held * SAMPLE_MB * workers_a_node / 1000:,.1f} GB")
        print("| " + " | ".join(cells) + " |")


def at_scale() -> list[Mixing]:
    """The card's batch over 120,000 shards of 10,000."""
    counts = [SHARD_SIZE] * SHARDS
    rows = [even(SHARDS * SHARD_SIZE, SHARDS, GLOBAL_BATCH)]
    for streams, block in ((512, 256), (512, 1024), (512, 2560), (1536, 85), (3072, 43), (3072, 256)):
        order = Order(0, counts, GLOBAL_BATCH, streams, WORKERS, block)
        rows.append(ours(f"streams {streams}, block {block}", order, RANKS * WORKERS))
    return [*rows, webdataset(1000), webdataset(5000)]


def small() -> list[Mixing]:
    """conf/experiment/fluent.yaml: 1,563 samples in 16 shards, batch 32."""
    counts = [100] * 15 + [63]
    rows = [even(1563, 16, 32)]
    for streams, phases, block in ((8, 2, 256), (32, 1, 256), (8, 2, 16), (1, 1, 256), (1, 1, 1563)):
        name = f"streams {streams}, phases {phases}, block {block}"
        rows.append(ours(name, Order(0, counts, 32, streams, phases, block), phases))
    return rows


def draw(rows: list[Mixing], path: Path) -> None:
    """Left: when the rows of one shard come. Right: how far neighbours are apart, as shares below a distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [m for m in rows if m.held in (256, 258, 1000, 5000) or m.name == EVEN]
    figure, (when, apart) = plt.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained")
    for number, m in enumerate(shown):
        colour = f"C{number}"
        if len(m.steps_of_shard) and m.held != 1000:
            when.plot(np.arange(len(m.steps_of_shard))[::5], m.steps_of_shard[::5] / 1000, ".", ms=2, color=colour)
        distance = np.sort(np.maximum(m.apart / GLOBAL_BATCH, 0.5))
        apart.plot(distance, np.linspace(0, 100, len(distance)), color=colour, label=m.name)
    when.set(xlabel="row in the shard", ylabel="thousand steps after its first row", title="When one shard's rows come")
    apart.set(xscale="log", xlabel="batches apart", ylabel="% of the pairs", title="Neighbours in a shard")
    figure.legend(loc="outside lower center", ncols=5)
    aside = path.with_name(path.name + ".part")
    figure.savefig(aside, format="png")
    aside.rename(path)


def measure(args: OrderQuality) -> None:
    """Print both tables."""
    rows = at_scale()
    table(rows, GLOBAL_BATCH, 8 * WORKERS)
    print()
    table(small(), 32)
    if args.picture:
        draw(rows, Path(args.picture))


def main(argv: list[str] | None = None) -> None:
    command(measure, OrderQuality, argv)


if __name__ == "__main__":
    main()
