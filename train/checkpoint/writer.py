"""Writes checkpoints beside the training: a snapshot on the host, a thread a rank that writes it, one rename."""

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.text.meta import TextMeta
from train.checkpoint.format import MANIFEST, CheckpointFailed, complete_checkpoints, file_sha256, sealed
from train.checkpoint.reader import part_file
from train.config import Config
from train.ema import EMA
from train.engine import Engine
from train.faults.preempt import RankConsensus


class CheckpointWriter:
    """One checkpoint at a time; every method is a collective call, made by the thread that trains.

    The writing threads touch files and host memory alone, never a process group. That all have written is found out by
    the trainers between two steps (poll), and only then the first rank's thread makes the manifest and renames.
    Methods raise: CheckpointFailed on all ranks if one of them could not write; the checkpoints before are untouched.
    """

    def __init__(self, config: Config, samples: list[int], meta: TextMeta, consent: RankConsensus) -> None:
        self._config, self._samples, self._meta, self._consent = config, samples, meta, consent
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        self._publish: Callable[[list[tuple[int, str]]], None] | None = None
        self._renaming = False  # or else still writing
        self._error, self._written = "", (0, "")
        self._stalled, self._since = 0.0, time.perf_counter()
        self._aside = Path()

    def begin(self, step: int, engine: Engine, ema: EMA) -> None:
        """Copy the state of a step to the host and let it be written."""
        self.finish()
        began = time.perf_counter()
        folder = Path(self._config.run_dir) / "checkpoints" / f"step-{step:08d}"
        self._aside = aside = folder.with_suffix(".part")
        moments = {f"moments.{name}": value for name, value in engine.moments.items()}
        state = {"master": engine.master.detach(), "ema": ema.average, **moments}
        snapshot = {name: value.to("cpu", copy=True) for name, value in state.items()}
        told = {
            "step": step,
            "schedule_step": engine.schedule_step,
            "ranks": self._ranks,
            "samples": self._samples,
            "text": asdict(self._meta),
            "parameters": {name: list(p.shape) for name, p in engine.model.named_parameters() if p.requires_grad},
            "config": asdict(self._config),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "bitsandbytes", "safetensors")}
            | {"python": platform.python_version()},
        }

        def write() -> None:
            # Not run_dir itself: if that is gone, so is the disk it was on, and its place is no place to write to.
            aside.parent.mkdir(exist_ok=True)
            aside.mkdir(exist_ok=True)
            file = aside / part_file(self._rank)
            save_file(snapshot, file)
            _to_disk(file)
            self._written = (file.stat().st_size, file_sha256(file))

        def publish(written: list[tuple[int, str]]) -> None:
            names = [part_file(rank) for rank in range(self._ranks)]
            for name, (size, _) in zip(names, written, strict=True):
                if (aside / name).stat().st_size != size:  # not there: that rank wrote to a disk of its own
                    raise OSError(f"{name} has another size than its rank wrote")
            files = {name: size for name, (size, _) in zip(names, written, strict=True)}
            hashes = {name: sha256 for name, (_, sha256) in zip(names, written, strict=True)}
            manifest = sealed({**told, "files": files, "sha256": hashes})
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            _to_disk(aside / MANIFEST)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            _to_disk(folder.parent)
            self._prune()

        self._publish, self._renaming = publish, False
        self._start(write)
        self._stalled += time.perf_counter() - began

    def poll(self) -> None:
        """Go on with the checkpoint under way, once all ranks are ready to."""
        if not self._publish:
            return
        busy, failed = self._consent.any(self._thread is not None and self._thread.is_alive(), bool(self._error))
        if busy:
            return
        if failed:
            self._fail()
        if self._renaming:
            self._publish = None
            return
        began, publish = time.perf_counter(), self._publish
        written = self._consent.gather(self._written)
        if self._rank == 0:
            self._start(lambda: publish(written))
        self._renaming = True
        self._stalled += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete."""
        began = time.perf_counter()
        while self._publish:
            self.poll()
            time.sleep(0.01)
        self._stalled += time.perf_counter() - began

    def stall_share(self) -> float:
        """The share of the time since the last call that the trainer of this rank waited for checkpoints."""
        now = time.perf_counter()
        share = self._stalled / (now - self._since)
        self._stalled, self._since = 0.0, now
        return share

    def _start(self, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
                self._error = f"rank {self._rank}: {error}"

        # A daemon: a process that ends for another reason does not wait for it, and what is aside does not count.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _fail(self) -> None:
        problems = list(filter(None, self._consent.gather(self._error)))
        if self._rank == 0:
            shutil.rmtree(self._aside, ignore_errors=True)  # a full disk is not to stay full of half a checkpoint
        raise CheckpointFailed(
            f"the checkpoint '{self._aside}' could not be written ({problems[0]}); those before are intact: "
            "make room or mend the storage, then run the same command"
        )

    def _prune(self) -> None:
        keep, every = self._config.keep_checkpoints, self._config.keep_every
        for old in complete_checkpoints(Path(self._config.run_dir))[:-keep]:
            if not every or int(old.name.removeprefix("step-")) % every:
                shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Through the caches, so that a machine that loses its power has it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
