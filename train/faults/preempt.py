"""A signal to one rank stops all ranks together: after this step or the next they save, and exit to be requeued."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from data.cli import REQUEUE
from data.interrupt import INTERRUPTED, tell, tell_interrupted
from data.storage.tars import write_json
from train.faults.route import gloo_reaches_all

# Slurm's warning before the time limit or a preemption; what launchers send when they are ended; Ctrl-C.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")

_state = {"process": 0, "stop_requested": False, "interrupted": False, "training": False}


def install_signal_handlers() -> None:
    """Handle SIGNALS: before training begins the process exits at once, during training the signal requests a stop.

    A second Ctrl-C during training ends the process at once.
    A signal that the launcher ignores is handled here all the same: a handler replaces an inherited disposition.
    """
    _state["process"] = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # after a rollback they are blocked


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state["process"]:
        return  # a loader worker, which its rank ends
    if number != signal.SIGINT:
        if not _state["training"]:
            os._exit(REQUEUE)
    elif not _state["training"]:
        tell_interrupted()
        os._exit(INTERRUPTED)
    elif _state["interrupted"]:
        tell("stopped at once by Ctrl-C; the checkpoints before are whole")
        os._exit(INTERRUPTED)
    else:
        _state["interrupted"] = True
        tell("Ctrl-C: this step or the next is the last and is saved; press again to end at once, without saving")
    _state["stop_requested"] = True


def stop_requested() -> bool:
    """Whether a signal asked this rank to stop."""
    return bool(_state["stop_requested"])


class RankConsensus:
    """Tells all ranks what is true on one of them, with the same answer on all.

    It has a process group of its own over the hosts' network, so it does not wait for the device and allocates nothing
    there. All ranks construct it when training begins; from then on a signal requests a stop instead of an exit.
    """

    def __init__(self) -> None:
        with gloo_reaches_all():
            self._group = dist.new_group(backend="gloo")
        _state["training"] = True

    def ask(self, *flags: bool) -> Callable[[], list[bool]]:
        """Ask whether each flag is true on any rank, as it is now; a collective call that waits for nobody.

        Returns a function that waits for the answer. Asked at the start of a step and read at its end, the answer is
        there already: gradients were summed over the ranks meanwhile.
        """
        raised = torch.tensor(flags, dtype=torch.int32)
        asked = dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True)

        def answer() -> list[bool]:
            asked.wait()
            return [bool(flag) for flag in raised.tolist()]

        return answer

    def mean(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """The means over the ranks of some numbers on the host, float64; a collective call that waits for nobody.

        Returns a function that waits for the answer.
        """
        summed = values.clone()
        asked = dist.all_reduce(summed, group=self._group, async_op=True)

        def answer() -> list[float]:
            asked.wait()
            return (summed / dist.get_world_size()).tolist()

        return answer

    def gather(self, value: object) -> list:
        """The values of all ranks, by rank; a collective call, for small values."""
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: T, rank: int) -> T:
        """The value of one rank, on all; a collective call, for a micro batch or less."""
        shared = [value]
        dist.broadcast_object_list(shared, src=rank, group=self._group)
        return shared[0]


def mark_done(run_dir: Path, step: int) -> None:
    """Write RUN_DIR/done: all steps are made. The exit status of a launcher does not say that reliably."""
    write_json(run_dir / "done", {"step": step})
