"""Several datasets in one sequence: every global batch has so many samples of each, evenly mixed."""

import numpy as np

from data.loader.order import Block, Order


class Mixture:
    """The order of samples of one run; each dataset goes through epochs of its own.

    counts: samples per shard, dataset by dataset.  weights: shares of the datasets in a batch, in any unit.
    The others: as for Order; the streams are shared out like the batch.
    Raises: ValueError, also for a weight that gives no sample of a batch.
    """

    def __init__(
        self, seed: int, counts: list[list[int]], weights: list[float], global_batch: int, streams: int, phases: int,
        block_size: int,
    ) -> None:  # fmt: skip
        sizes = share_out(global_batch, weights)
        # Slot k of n of a dataset stands at (k + 1/2) / n of the batch, so each rank gets its part of each.
        at = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes])
        number = np.concatenate([np.arange(n) for n in sizes])
        dataset = np.repeat(np.arange(len(sizes)), sizes)
        order = np.argsort(at, kind="stable")
        self._dataset, self._slot = dataset[order].tolist(), number[order].tolist()
        self.orders = [
            # Another seed for each, or datasets of as many shards would be permuted alike.
            Order(seed + i, c, n, max(1, streams * n // global_batch), phases, block_size)
            for i, (c, n) in enumerate(zip(counts, sizes, strict=True))
        ]

    def locate(self, step: int, slot: int) -> tuple[int, Block, int]:
        """Dataset, block and number in the block's shuffled order of the sample at a position."""
        dataset = self._dataset[slot]
        return dataset, *self.orders[dataset].locate(step, self._slot[slot])

    def visit(self, dataset: int, epoch: int, shard: int, row: int) -> int:
        """The key of all draws for a sample in an epoch of its dataset; no two datasets share one."""
        return self.orders[dataset].visit(epoch, shard, row) * len(self.orders) + dataset


def share_out(total: int, weights: list[float]) -> list[int]:
    """The whole numbers next to total x weight / sum of the weights that add up to the total.

    The largest remainders are rounded up. Raises: ValueError for a weight that is not above 0, or comes out at none.
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
