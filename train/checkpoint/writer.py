"""Writes checkpoints and snapshots of the averages while the training goes on: a copy in host memory, one writing
thread per rank, one rename.
"""

import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from data.storage.atomic import WRITE_ERRORS
from if_train import project_version
from train.checkpoint.format import (
    CHECKPOINTS,
    SNAPSHOTS,
    CheckpointFailed,
    complete_checkpoints,
    step_folder,
    step_of,
)
from train.checkpoint.identity import DataIdentity
from train.checkpoint.new_folder import NewFolder, WrongFile
from train.config import Config
from train.ema import EMA
from train.engine import Engine
from train.faults.checksum import Corrupted
from train.faults.compile_cache import keep_cache
from train.faults.limits import SAVE
from train.faults.preempt import RankConsensus
from train.faults.quarantine import node_name, record_node_fault
from train.faults.spikes import SpikeMemory
from train.faults.watchdog import Watchdog
from train.weights.power_average import TRACKED

# Of the averages in a snapshot.
SNAPSHOT_DTYPE = torch.float16


class CheckpointWriter:
    """Writes the folders of one step at a time; begin, poll and finish are collective calls of the training threads.

    The writing threads touch files and host memory alone, never a process group. The training threads ask one another
    in each step (progress) whether all ranks have written. If they have, the first rank's thread writes the manifest
    and renames (poll).
    changes: of the configuration since the run's first step, as train.checkpoint.resume.find_history makes them.
    watchdog: is given the time of a save by begin and finish.
    Methods raise: CheckpointFailed on all ranks if one of them could not write; older checkpoints stay untouched.
    """

    def __init__(
        self, config: Config, data: DataIdentity, changes: list[dict], consensus: RankConsensus, watchdog: Watchdog
    ) -> None:
        self._watchdog = watchdog
        self._config, self._data, self._changes, self._consensus = config, data, changes, consensus
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        # What the first rank does once all ranks have written; None while no checkpoint is under way.
        self._publish: Callable[[list[list[tuple[int, str]]]], None] | None = None
        self._publishing = False
        # Of this rank's thread: its error, and what was corrupted if that is the error; size and SHA-256 of its files.
        self._error, self._corrupted, self._written = "", "", list[tuple[int, str]]()
        self._stalled, self._since = 0.0, time.perf_counter()
        self._folders: list[NewFolder] = []

    def due(self, step: int, ending: bool) -> list[str]:
        """What is written after a step: SNAPSHOTS, CHECKPOINTS, both or nothing.  ending: whether the run leaves."""
        periods = {SNAPSHOTS: self._config.ema_snapshot_every, CHECKPOINTS: self._config.save_every}
        due = {kind for kind, every in periods.items() if every and step % every == 0}
        # Snapshots first, so that no checkpoint lacks one of before.
        return [kind for kind in periods if kind in due or (ending and kind == CHECKPOINTS)]

    def begin(self, kinds: list[str], step: int, engine: Engine, ema: EMA, spikes: SpikeMemory) -> None:
        """Copy what is due of the state of a step to the host and start to write it."""
        self.finish()  # which gives the watchdog the time of a save
        began = time.perf_counter()
        run_dir, manifest = Path(self._config.run_dir), self._manifest(step, engine) | {"spikes": asdict(spikes)}
        moments = {f"moments.{name}": value for name, value in engine.moments.items()}
        states = {CHECKPOINTS: {"master": engine.master.detach(), **ema.averages, **moments}}
        if SNAPSHOTS in kinds:
            states[SNAPSHOTS] = {name: ema.averages[name].to(SNAPSHOT_DTYPE) for name in TRACKED}
        self._folders = folders = [NewFolder(step_folder(run_dir, step, kind), states[kind]) for kind in kinds]

        def write() -> None:
            self._written = [folder.write(self._rank) for folder in folders]

        def publish(written: list[list[tuple[int, str]]]) -> None:
            for folder, files in zip(folders, zip(*written, strict=True), strict=True):
                folder.publish(files, manifest)
            self._prune()
            keep_cache()  # the other part of a quick restart

        self._publish, self._publishing = publish, False
        self._start(write)
        self._stalled += time.perf_counter() - began
        self._watchdog.reset()

    def progress(self) -> tuple[bool, bool]:
        """Whether this rank's thread is at work, and whether it failed; what the ranks ask one another of it."""
        return self._thread is not None and self._thread.is_alive(), bool(self._error)

    def poll(self, busy: bool, failed: bool) -> None:
        """Advance the checkpoint under way.  busy, failed: whether progress() was so on any rank."""
        if busy or not self._publish:
            return
        if failed:
            self._fail()
        if self._publishing:
            self._publish = None
            return
        began, publish = time.perf_counter(), self._publish
        written = self._consensus.gather(self._written)
        if self._rank == 0:
            self._start(lambda: publish(written))
        self._publishing = True
        self._stalled += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete."""
        self._watchdog.reset(SAVE)
        began = time.perf_counter()
        while self._publish:
            self.poll(*self._consensus.ask(*self.progress())())
            time.sleep(0.01)
        self._stalled += time.perf_counter() - began

    def stall_share(self) -> float:
        """The share of the time since the last call in which this rank's training waited for checkpoints."""
        now = time.perf_counter()
        share = self._stalled / (now - self._since)
        self._stalled, self._since = 0.0, now
        return share

    def _manifest(self, step: int, engine: Engine) -> dict:
        """What the manifest says, but for the files."""
        return {
            "step": step,
            "schedule_step": engine.schedule_step,
            "ranks": self._ranks,
            **self._data.entries(),
            "parameters": {name: list(p.shape) for name, p in engine.model.named_parameters() if p.requires_grad},
            "config": asdict(self._config),
            "changes": self._changes,
            "versions": {name: version(name) for name in ("torch", "deepspeed", "bitsandbytes", "safetensors")}
            | {"python": platform.python_version(), "if-stage1-train": project_version()},
        }

    def _start(self, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            except WRITE_ERRORS as error:
                self._error = f"rank {self._rank}: {error}"
                self._corrupted = error.what if isinstance(error, WrongFile) else ""

        # A daemon thread: a process that ends for another reason does not wait for it, and a .part folder is ignored.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _fail(self) -> None:
        found = self._consensus.gather((self._error, self._corrupted, node_name()))
        problems, aside = [error for error, _, _ in found if error], self._folders[-1].aside
        corrupted = {node: what for _, what, node in found if what}
        if self._rank == 0:
            for folder in self._folders:
                shutil.rmtree(folder.aside, ignore_errors=True)  # half of one must not keep a full disk full
            for node, what in corrupted.items():
                record_node_fault(Path(self._config.run_dir), node, "corruption", what)
        self._consensus.gather(None)  # no rank leaves before, or the first one would be ended before it has said why
        if corrupted:
            raise Corrupted(
                f"the checkpoint '{aside}' is wrong ({problems[0]}); those before are intact: leave out "
                f"{', '.join(corrupted)}, and run the same command"
            )
        raise CheckpointFailed(
            f"the checkpoint '{aside}' could not be written ({problems[0]}); those before are intact: "
            "make room or repair the storage, then run the same command"
        )

    def _prune(self) -> None:
        keep, every = self._config.keep_checkpoints, self._config.keep_every
        for old in complete_checkpoints(Path(self._config.run_dir))[:-keep]:
            if not every or step_of(old) % every:
                shutil.rmtree(old, ignore_errors=True)
