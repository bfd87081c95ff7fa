"""Loader processes that die, fail, hang or are slow; with the stream itself in test_stream.py."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from data.loader.batch import Batch
from data.loader.workers import LoaderDied, Workers


def toy_workers(act: Callable[[int], None], samples: int = 32, patience: float = 100.0) -> Workers:
    """Batches whose visit is their number, by two processes that first call act with it."""

    def fill(first: int, stride: int, buffers: list[Batch]) -> Iterator[Batch]:
        for number, buffer in zip(itertools.count(first, stride), itertools.cycle(buffers)):
            act(number)
            buffer.visit[:] = number
            yield buffer

    def new_buffer() -> Batch:
        return Batch.shared(samples, 1, (1, 1), torch.float32)

    return Workers(fill, new_buffer, "number {}".format, 0, 2, False, patience)


def test_a_worker_that_dies_at_the_same_batch_again_and_again_ends_the_run(caplog):
    def act(number: int) -> None:
        if number == 5:
            time.sleep(0.3)  # until what was made before has left the process
            os.kill(os.getpid(), signal.SIGKILL)

    batches = toy_workers(act)
    assert [int(next(batches).visit[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(LoaderDied, match=r"was killed by SIGKILL before micro batch 5 \(number 5\), 3 times in a row"):
        next(batches)
    assert caplog.text.count("started again") == 2


def test_an_error_in_a_worker_is_the_runs_error():
    def act(number: int) -> None:
        if number == 3:
            raise OSError("the disk is gone")

    batches = toy_workers(act)
    assert [int(next(batches).visit[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_worker_that_hangs_ends_the_run_and_a_slow_one_does_not(monkeypatch):
    monkeypatch.setattr("data.loader.workers.POLL_SECONDS", 0.1)
    batches = toy_workers(lambda number: time.sleep({2: 0.5, 4: 100}.get(number, 0)), patience=1.5)
    assert [int(next(batches).visit[0]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(LoaderDied, match=r"no loader worker made a batch for [12] s before micro batch 4"):
        next(batches)


def test_batches_that_are_kept_are_not_written_over():
    for samples in (5, 32):
        batches = toy_workers(lambda number: None, samples)
        assert [batch.visit.tolist() for batch in [next(batches) for _ in range(60)]] == [
            [n] * samples for n in range(60)
        ]
