"""Both ways between samples and positions, for many at once: what the measurements of the order stand on."""

from collections.abc import Iterator

import numpy as np

from data.loader.order import Block, Order


def by_block(epoch: int, stream: np.ndarray, number: np.ndarray) -> Iterator[tuple[Block, np.ndarray]]:
    """The blocks that stream [n] and number [n] name, each once, with the indices [m] where they name it."""
    if not len(stream):
        return
    order = np.lexsort((number, stream))
    seams = np.flatnonzero(np.diff(stream[order]) | np.diff(number[order])) + 1
    for part in np.split(order, seams):
        yield Block(epoch, int(stream[part[0]]), int(number[part[0]])), part


def samples_at(order: Order, positions: np.ndarray) -> np.ndarray:
    """The samples [n], by their index in the dataset, at positions [n] of one epoch."""
    epoch, stream, number, within = order.locate_all(positions)
    assert (epoch == epoch[0]).all()
    samples = np.empty_like(positions)
    for block, part in by_block(int(epoch[0]), stream, number):
        shard, row, shuffle = order.rows(block)
        place = shuffle[within[part]]
        samples[part] = order.first_index[shard[place]] + row[place]
    return samples


def positions_of(order: Order, epoch: int, samples: np.ndarray) -> np.ndarray:
    """The positions [n] at which samples [n], by their index, come in an epoch: samples_at the other way round."""
    shard = np.searchsorted(order.first_index, samples, side="right") - 1
    shards, ends = order._line(epoch)
    place = ends[np.argsort(shards)[shard]] - order.counts[shard] + samples - order.first_index[shard]
    pieces = order._pieces(epoch)
    stream = np.searchsorted(pieces, place, side="right") - 1
    number, inside = np.divmod(place - pieces[stream], order.block_size)
    within = np.empty_like(inside)
    for block, part in by_block(epoch, stream, number):
        within[part] = np.argsort(order.rows(block)[2])[inside[part]]
    # The k-th position of a stream, counted from the run's beginning: it has the same slots in every cycle of phases.
    before = order._dealt_to(stream, np.full_like(stream, epoch * order.samples))
    phase, piece = np.divmod(stream, order.streams)
    first, end = (-(-p * order.global_batch // order.streams) for p in (piece, piece + 1))
    cycle, slot = np.divmod(before + number * order.block_size + within, end - first)
    return (cycle * order.phases + phase) * order.global_batch + first + slot
