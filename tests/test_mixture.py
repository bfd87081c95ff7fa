"""Mixtures: the shares of each batch, each sample once an epoch of its dataset, and one dataset as if unmixed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader.mixture import Mixture, share_out
from data.loader.order import Order


def sequence(mixture: Mixture, steps: int, global_batch: int) -> list[list[tuple[int, int, int, int, int]]]:
    """(dataset, epoch, shard, row, visit) of every slot of every batch."""
    batches = []
    for step in range(steps):
        batch = []
        for slot in range(global_batch):
            dataset, block, within = mixture.locate(step, slot)
            shard, row, shuffle = mixture.orders[dataset].rows(block)
            s, r = int(shard[shuffle[within]]), int(row[shuffle[within]])
            batch.append((dataset, block.epoch, s, r, mixture.visit(dataset, block.epoch, s, r)))
        batches.append(batch)
    return batches


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.4, 5), min_size=3, max_size=3),
    global_batch=st.integers(30, 40),
    streams=st.integers(1, 20),
    phases=st.integers(1, 3),
    block_size=st.integers(1, 9),
)
def test_each_batch_has_its_shares_and_each_sample_comes_once_an_epoch(
    counts, weights, global_batch, streams, phases, block_size
):
    weights = weights[: len(counts)]
    mixture = Mixture(0, counts, weights, global_batch, streams, phases, block_size)
    shares, steps = share_out(global_batch, weights), 6
    batches = sequence(mixture, steps, global_batch)
    for batch in batches:
        assert [Counter(d for d, *_ in batch)[i] for i in range(len(counts))] == shares
    everything = [sample for batch in batches for sample in batch]
    assert len({visit for *_, visit in everything}) == len(everything), "no two draws share a key"
    for dataset, shards in enumerate(counts):
        seen = Counter((epoch, shard, row) for d, epoch, shard, row, _ in everything if d == dataset)
        assert set(seen.values()) == {1}
        for epoch in range(steps * shares[dataset] // sum(shards)):
            assert sum(e == epoch for e, _, _ in seen) == sum(shards)


def test_one_dataset_is_the_order_itself():
    counts = [7, 0, 30, 12]
    mixture, order = Mixture(5, [counts], [0.3], 8, 4, 2, 6), Order(5, counts, 8, 4, 2, 6)
    for step in range(20):
        for slot in range(8):
            assert mixture.locate(step, slot) == (0, *order.locate(step, slot))
    assert mixture.visit(0, 2, 3, 5) == order.visit(2, 3, 5)


def test_a_dataset_is_spread_over_the_whole_batch():
    mixture = Mixture(0, [[100], [100]], [3, 1], 16, 4, 1, 4)
    slots = [mixture.locate(0, slot)[0] for slot in range(16)]
    assert all(slots[i : i + 4].count(1) == 1 for i in range(0, 16, 4)), "each of four ranks has one of the small set"


def test_datasets_of_one_shape_are_not_permuted_alike():
    mixture = Mixture(0, [[5] * 40, [5] * 40], [1, 1], 8, 2, 1, 5)
    batches = sequence(mixture, 20, 8)
    shards = [[s for batch in batches for d, _, s, *_ in batch if d == i] for i in range(2)]
    assert shards[0] != shards[1]


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(10, [1], [10]), (10, [1, 1, 1], [4, 3, 3]), (3072, [0.9, 0.1], [2765, 307]), (7, [5, 1, 1], [5, 1, 1])],
)
def test_shares_are_whole_and_add_up(total, weights, shares):
    assert share_out(total, weights) == shares


@pytest.mark.parametrize(
    ("weights", "words"), [([1, 0], "above 0"), ([1, float("nan")], "above 0"), ([1e6, 1], "raise the")]
)
def test_weights_that_cannot_be_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        share_out(100, weights)
