"""The order of samples: each once an epoch, whatever the shards; nothing but the position decides it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Block, Order


def visits(order: Order, positions: range) -> list[int]:
    found = []
    for position in positions:
        block, within = order.locate(*divmod(position, order.global_batch))
        shard, row, shuffle = order.rows(block)
        place = shuffle[within]
        found.append(order.visit(block.epoch, int(shard[place]), int(row[place])))
    return found


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 5),
    global_batch=st.integers(1, 20),
    streams=st.integers(1, 20),
    phases=st.integers(1, 4),
    block_size=st.integers(1, 20),
)
def test_each_sample_once_an_epoch(counts, seed, global_batch, streams, phases, block_size):
    order = Order(seed, counts, global_batch, min(streams, global_batch), phases, block_size)
    n = sum(counts)
    for epoch in range(3):
        seen = visits(order, range(epoch * n, (epoch + 1) * n))
        assert sorted(seen) == list(range(epoch * n, (epoch + 1) * n))


def test_a_position_is_found_without_those_before():
    counts = [100, 57, 3, 240]
    walked = visits(Order(1, counts, 12, 4, 2, 16), range(1200))
    jumped = [visits(Order(1, counts, 12, 4, 2, 16), range(g, g + 1))[0] for g in (1199, 3, 700)]
    assert jumped == [walked[1199], walked[3], walked[700]]


def test_epochs_and_seeds_differ_and_neighbours_part():
    counts = [50] * 20
    order = Order(0, counts, 16, 4, 2, 64)
    first, second = (np.array(visits(order, range(e * 1000, (e + 1) * 1000))) % 1000 for e in (0, 1))
    other_seed = np.array(visits(Order(1, counts, 16, 4, 2, 64), range(1000)))
    assert (first == second).mean() < 0.02 and (first == other_seed).mean() < 0.02
    # Two samples that lie next to each other in a shard come, in the median, further apart than a whole batch.
    place = np.argsort(first)
    assert np.median(np.abs(np.diff(place))) > 16


def test_shards_and_blocks_are_permuted_anew():
    order = Order(0, [50] * 20, 16, 4, 2, 64)
    lines = {tuple(order._line(epoch)[0]) for epoch in range(4)}
    assert len(lines) == 4 and all(sorted(line) == list(range(20)) for line in lines)
    shuffles = {tuple(order.rows(Block(epoch, stream, 0))[2]) for epoch in range(3) for stream in range(8)}
    assert len(shuffles) == 24


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"data.streams=9 must lie between 1 and global_batch=8"):
        Order(0, [10], 8, 9, 1, 4)
    with pytest.raises(ValueError, match="shuffle_block=0"):
        Order(0, [10], 8, 2, 1, 0)
