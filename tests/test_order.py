"""The order of samples: each once an epoch, whatever the shards; nothing but the position decides it."""

import hashlib

import numpy as np
import pytest
from benchmarks.places import positions_of, samples_at
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader.order import Block, Order

shard_counts = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


@st.composite
def orders(draw) -> Order:
    global_batch = draw(st.integers(1, 20))
    return Order(
        seed=draw(st.integers(0, 5)),
        counts=draw(shard_counts),
        global_batch=global_batch,
        streams=draw(st.integers(1, global_batch)),
        phases=draw(st.integers(1, 4)),
        block_size=draw(st.integers(1, 20)),
    )


def visits(order: Order, positions: range) -> list[int]:
    found = []
    for position in positions:
        block, within = order.locate(*divmod(position, order.global_batch))
        shard, row, shuffle = order.rows(block)
        index = shuffle[within]
        found.append(order.visit(block.epoch, int(shard[index]), int(row[index])))
    return found


@settings(max_examples=100, deadline=None)
@given(order=orders())
def test_each_sample_once_an_epoch(order):
    n = order.samples
    for epoch in range(3):
        seen = visits(order, range(epoch * n, (epoch + 1) * n))
        assert sorted(seen) == list(range(epoch * n, (epoch + 1) * n))


@settings(max_examples=100, deadline=None)
@given(
    counts=shard_counts,
    ranks=st.integers(1, 5),
    micro_batches=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    workers=st.integers(1, 5),
    streams=st.integers(1, 20),
    phases=st.integers(1, 4),
    block_size=st.integers(1, 20),
)
def test_ranks_and_workers_share_out_one_sequence(
    counts, ranks, micro_batches, micro_batch, workers, streams, phases, block_size
):
    """Each rank and worker by itself, with an order of its own: put together, they make the one sequence."""
    global_batch = ranks * micro_batches * micro_batch
    how = (1, counts, global_batch, min(streams, global_batch), phases, block_size)
    steps = -(-2 * sum(counts) // global_batch)
    made: dict[int, int] = {}
    for rank in range(ranks):
        for worker in range(workers):
            order = Order(*how)
            for unit in range(worker, steps * micro_batches, workers):
                step, micro = divmod(unit, micro_batches)
                first = (step * ranks + rank) * micro_batches * micro_batch + micro * micro_batch
                here = range(first, first + micro_batch)
                assert not made.keys() & set(here)
                made.update(zip(here, visits(order, here), strict=True))
    n = sum(counts)
    sequence = [made[position] for position in range(2 * n)]
    assert sequence == visits(Order(*how), range(2 * n))
    # Also where an epoch ends in the middle of a batch.
    assert sorted(sequence[:n]) == list(range(n)) and sorted(sequence[n:]) == list(range(n, 2 * n))


@settings(max_examples=100, deadline=None)
@given(order=orders(), epoch=st.integers(0, 4))
def test_many_positions_at_once_and_back(order, epoch):
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    columns = zip(*(column.tolist() for column in order.locate_all(positions)), strict=True)
    one_by_one = [order.locate(*divmod(position, order.global_batch)) for position in positions.tolist()]
    assert [(*block, within) for block, within in one_by_one] == list(columns)
    samples = samples_at(order, positions)
    assert (samples + epoch * order.samples).tolist() == visits(order, range(positions[0], positions[-1] + 1))
    # The benchmarks stand on this way back.
    assert (positions_of(order, epoch, samples) == positions).all()


def test_a_position_is_found_without_those_before():
    counts = [100, 57, 3, 240]
    walked = visits(Order(1, counts, 12, 4, 2, 16), range(1200))
    jumped = [visits(Order(1, counts, 12, 4, 2, 16), range(g, g + 1))[0] for g in (1199, 3, 700)]
    assert jumped == [walked[1199], walked[3], walked[700]]


def test_the_sequence_is_the_one_it_always_was():
    """A run that goes on must meet the order it was begun with, under any later version of this code and of NumPy."""
    sequence = np.array(visits(Order(7, [100, 57, 0, 240], 12, 4, 2, 16), range(1000)), dtype="<i8")
    assert (
        hashlib.sha256(sequence.tobytes()).hexdigest()
        == "d92a8237b8a872f14e552270ee8cbc4835a386a543f5f366b9435563950272c9"
    )


def test_epochs_and_seeds_differ_and_neighbours_part():
    counts = [50] * 20
    order = Order(0, counts, 16, 4, 2, 64)
    first, second = (np.array(visits(order, range(e * 1000, (e + 1) * 1000))) % 1000 for e in (0, 1))
    other_seed = np.array(visits(Order(1, counts, 16, 4, 2, 64), range(1000)))
    assert (first == second).mean() < 0.02 and (first == other_seed).mean() < 0.02
    # Two samples that lie next to each other in a shard come, in the median, further apart than a whole batch.
    position = np.argsort(first)
    assert np.median(np.abs(np.diff(position))) > 16


def test_with_a_stream_for_each_slot_neighbours_share_no_batch():
    order = Order(0, [500] * 200, 64, 64, 2, 43)
    first = np.random.default_rng(0).integers(0, 99_999, 2000)
    one, other = (positions_of(order, 0, samples) // 64 for samples in (first, first + 1))
    same_block = first % 500 < 499
    assert (one != other)[same_block].all()


def test_shards_and_blocks_are_permuted_anew():
    order = Order(0, [50] * 20, 16, 4, 2, 64)
    lines = {tuple(order._line(epoch)[0]) for epoch in range(4)}
    assert len(lines) == 4 and all(sorted(line) == list(range(20)) for line in lines)
    shuffles = {tuple(order.rows(Block(epoch, stream, 0))[2]) for epoch in range(3) for stream in range(8)}
    assert len(shuffles) == 24


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(AssertionError):
        Order(0, [10], 8, 9, 1, 4)
    with pytest.raises(AssertionError):
        Order(0, [10], 8, 2, 1, 0)


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_shards_without_a_sample_are_refused(counts):
    with pytest.raises(ValueError, match=f"{len(counts)} shards with 0 samples"):
        Order(0, counts, 8, 2, 1, 4)
