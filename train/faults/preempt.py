"""A signal to one rank stops all ranks together: they finish the step, save, and exit with a status to requeue."""

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from data.cli import REQUEUE
from data.interrupt import INTERRUPTED, tell, tell_interrupted
from data.storage.tars import write_json

# Slurm's warning before the time limit or a preemption; what launchers send when they are ended; Ctrl-C.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_state = {"process": 0, "stop_requested": False, "interrupted": False, "training": False}


def install_signal_handlers() -> None:
    """Handle SIGNALS: before training begins the process exits at once, during training the signal requests a stop.

    A second Ctrl-C during training ends the process at once.
    A signal that the launcher ignores is handled here all the same: a handler replaces an inherited disposition.
    """
    _state["process"] = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _on_signal)


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
        tell("Ctrl-C: this step is finished and saved, then the run ends; press again to end at once, without saving")
    _state["stop_requested"] = True


class RankConsensus:
    """Tells all ranks what is true on one of them, between two steps.

    It has a process group of its own over the hosts' network, so it does not wait for the device and allocates nothing
    there. All ranks construct it when training begins; from then on a signal requests a stop instead of an exit.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        _state["training"] = True

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank; a collective call."""
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, value: object) -> list:
        """The values of all ranks, by rank; a collective call, for small values."""
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def stop_requested(self) -> bool:
        """Whether a signal asked any rank to stop; a collective call."""
        return self.any(bool(_state["stop_requested"]))[0]


def mark_done(run_dir: Path, step: int) -> None:
    """Write RUN_DIR/done: all steps are made. The exit status of a launcher does not say that reliably."""
    write_json(run_dir / "done", {"step": step})
