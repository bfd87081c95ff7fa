"""A signal to one rank becomes a decision of all: finish the step, save, leave with a status that says `requeue`."""

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from data.cli import REQUEUE
from data.storage.tars import write_json

# Slurm's warning before the time limit or a preemption, what launchers pass on when they are ended, and Ctrl-C.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_state = {"asked": False, "training": False}


def install_signal_handlers() -> None:
    """From now on the signals ask for leaving; until training begins there is nothing to save, and it is left at once.

    Ranks are told apart from their launcher here: deepspeed's ignores nothing that it was not started ignoring, while a
    handler set in this process takes the place of whatever was inherited.
    """
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _state["training"]:
        os._exit(REQUEUE)
    _state["asked"] = True
    if number == signal.SIGINT:  # whoever presses Ctrl-C again does not want to wait
        signal.signal(signal.SIGINT, signal.default_int_handler)


class RankConsensus:
    """What is true on one rank becomes known to all, once a step.

    By a group of its own over the hosts' network: it costs no wait for the device, and nothing is allocated there.
    Constructed by all ranks when training begins.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        _state["training"] = True

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is up on some rank; a collective call."""
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, value: object) -> list:
        """The small values of all ranks; a collective call."""
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def stop(self) -> bool:
        """Whether some rank was asked to leave; a collective call."""
        return self.any(_state["asked"])[0]


def mark_done(run_dir: Path, step: int) -> None:
    """Leave RUN_DIR/done: all steps are made. Launchers' exit statuses can't be trusted to tell."""
    write_json(run_dir / "done", {"step": step})
