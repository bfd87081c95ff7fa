"""Several datasets in one order: every global batch holds the same number of samples of each, evenly spread."""

import numpy as np

from data.loader.order import Block, Order


class Mixture:
    """The order of samples of one run. Each dataset has epochs of its own.

    counts, stored: for each dataset, as for Order.  weights: the datasets' shares of a batch, in any unit.
    The other arguments: as for Order; the streams are divided among the datasets as the batch is.
    Raises: ValueError, also for a weight that gives no sample of a batch.
    """

    def __init__(
        self, seed: int, counts: list[list[int]], weights: list[float], global_batch: int, streams: int, phases: int,
        block_size: int, stored: list[list[int]] | None = None,
    ) -> None:  # fmt: skip
        sizes = share_out(global_batch, weights)
        # Sample k of a dataset's n lies at (k + 1/2) / n of the batch, so each rank gets its part of every dataset.
        fraction = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes])
        slot = np.concatenate([np.arange(n) for n in sizes])
        dataset = np.repeat(np.arange(len(sizes)), sizes)
        order = np.argsort(fraction, kind="stable")
        self._dataset, self._slot = dataset[order].tolist(), slot[order].tolist()
        self.orders = [
            # Each has its own seed, or datasets with equal numbers of shards would get equal permutations.
            Order(seed + i, c, n, max(1, streams * n // global_batch), phases, block_size, in_tars)
            for i, (c, n, in_tars) in enumerate(zip(counts, sizes, stored or counts, strict=True))
        ]

    def locate(self, step: int, slot: int) -> tuple[int, Block, int]:
        """The dataset and the block of the sample at a step's slot, and its index in the block's shuffled order."""
        dataset = self._dataset[slot]
        return dataset, *self.orders[dataset].locate(step, self._slot[slot])

    def visit(self, dataset: int, epoch: int, shard: int, row: int) -> int:
        """The key of all draws for a sample in an epoch of its dataset, different for all datasets."""
        return self.orders[dataset].visit(epoch, shard, row) * len(self.orders) + dataset


def share_out(total: int, weights: list[float]) -> list[int]:
    """Whole numbers near total x weight / sum(weights) that add up to the total.

    The largest remainders are rounded up. Raises: ValueError for a weight that is not above 0 or gives a share of 0.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"data.mixture: the weights {weights} must all be above 0")
    exact = total * np.array(weights) / sum(weights)
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[i] += 1
    if not shares.all():
        raise ValueError(
            f"data.mixture: the weights {weights} give {shares.tolist()} samples of a batch of {total}: "
            "raise the smallest, or leave that dataset out"
        )
    return shares.tolist()
