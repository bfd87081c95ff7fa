"""Resuming from the newest undamaged checkpoint, on any number of ranks."""

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from data.checks import count
from data.cli import reason
from data.loader.dataset import Dataset
from data.storage.locations import is_remote, join
from data.storage.shards import Shard, read_stats
from data.text.meta import EMPTY
from train.checkpoint.changes import describe_changes, find_changes, rate_change
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import (
    CHECKPOINTS,
    MANIFEST,
    SNAPSHOTS,
    CheckpointFailed,
    latest_checkpoint,
    step_folders,
    step_of,
)
from train.checkpoint.identity import DataIdentity, check_same_run, describe_text
from train.config import Config
from train.faults.first_rank import of_first_rank, raise_on_all
from train.faults.spikes import SpikeMemory

if TYPE_CHECKING:  # the engine takes seconds to import, and check_resumable has no need of it
    from train.ema import EMA
    from train.engine import Engine


def check_resumable(config: Config, data: DataIdentity) -> None:
    """Make sure that the run can go on from its latest checkpoint, if it has one.

    Only the first rank looks. The number of ranks may be another, and the optimizer 8-bit or not.
    Raises: ValueError if the checkpoint belongs to another run or other data.
    """
    checkpoint = Checkpoint.latest(Path(config.run_dir))
    if checkpoint is None:
        return
    folder = checkpoint.folder
    check_same_run(str(folder), checkpoint.manifest, asdict(config), data)
    if checkpoint.step > config.steps:
        raise ValueError(f"'{folder}' is beyond steps={config.steps}: raise steps, or choose another run_dir")
    if config.ema_snapshot_every and not checkpoint.config.get("ema_snapshot_every"):
        raise ValueError(
            f"'{folder}' has no power-function averages, since the run began with ema_snapshot_every=0, or went on "
            "with it: set it back, or begin from scratch in another run_dir"
        )


def check_same_everywhere(config: Config, datasets: list[Dataset], held_out: list[Dataset]) -> None:
    """Make sure that all ranks see the first rank's latest checkpoint and shards; a collective call.

    A rank looks at one manifest and, of each dataset, at one shard, each rank at another one, and the empty caption.
    datasets, held_out: as the first rank found them.
    Raises: ValueError on all ranks if run_dir, or shards or text of the data are not shared between the nodes.
    """
    rank, ranks, run_dir = dist.get_rank(), dist.get_world_size(), Path(config.run_dir)
    latest = of_first_rank(lambda: latest_checkpoint(run_dir))
    what = ""
    if latest and not (latest / MANIFEST).is_file():
        what = f"run_dir={config.run_dir} (its latest checkpoint)"
    for key, found, given in (("data", datasets, config.data), ("data.validation", held_out, config.data.validation)):
        if not all(_is_here(d.shards[rank * len(d.shards) // ranks]) for d in found):
            what = what or f"{key}.shards={given.shards}"
        elif not all(is_remote(d.text) or os.path.isfile(join(d.text, EMPTY)) for d in found):
            what = what or f"{key}.text={given.text}"
        elif not all(d.selection is None or d.selection.is_here() for d in found):
            what = what or "selection beside the index of data.shards"
    raise_on_all(what and f"rank {rank} sees another {what} than rank 0: put it on storage that all nodes share")


def _is_here(shard: Shard) -> bool:
    """Whether this rank sees the shard that the first rank found: its size, its count and its captions' digest."""
    if is_remote(shard.location):
        return True
    try:
        size, stats = os.path.getsize(shard.location), read_stats(shard.location)
    except (OSError, ValueError):
        return False
    if stats and stats.digest and shard.digest and stats.digest != shard.digest:
        return False
    # An index has its own count of a tar, which is right where the stats file's is not; it has the tar's size too.
    return shard.size == size if shard.size is not None else not stats or stats.samples == shard.count


def resume(config: Config, data: DataIdentity, engine: "Engine", ema: "EMA") -> tuple[int, list[dict], SpikeMemory]:
    """Restore the newest undamaged checkpoint; a collective call.

    The first rank reads the manifest and looks at the sizes of all files. Every rank checks the contents of its share
    of them, then reads its own part: each byte is read twice in all. A damaged checkpoint is renamed to
    step-NNNNNNNN.damaged. The first rank prints from which step the run goes on, and with what changes.
    Returns its step, 0 if there is none; the changes of the configuration on the way there and now, as find_history
    makes them; and what the run remembers of its spikes.
    Raises: CheckpointFailed if there are checkpoints, and all of them are damaged or one cannot be read.
    """
    rank, ranks, run_dir = dist.get_rank(), dist.get_world_size(), Path(config.run_dir)
    checkpoints = run_dir / CHECKPOINTS
    if rank == 0:
        for unfinished in (part for kind in (CHECKPOINTS, SNAPSHOTS) for part in (run_dir / kind).glob("*.part")):
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a start that was killed as it saved
        (run_dir / "done").unlink(missing_ok=True)  # left by a start with fewer steps
    folders = of_first_rank(lambda: step_folders(run_dir))
    faults: list[tuple[str, str]] = [("", "")] * ranks
    for folder in folders:
        checkpoint, fault, unreadable = of_first_rank(partial(_read, folder))
        try:
            fault = fault or (checkpoint.verify(rank, ranks) if checkpoint else "")
        except OSError as error:
            unreadable = reason(error)
        dist.all_gather_object(faults, (fault, unreadable))
        if problem := next((unreadable for _, unreadable in faults if unreadable), ""):
            raise CheckpointFailed(
                f"the checkpoint '{folder}' cannot be read ({problem}), which is no damage of it: repair the storage "
                "or raise the limit, then run the same command; or move that folder away to resume from the one before"
            )
        if checkpoint and not any(fault for fault, _ in faults):
            _remove_later_snapshots(run_dir, checkpoint.step)
            return _restore(checkpoint, config, data, engine, ema)
        if rank == 0:
            _set_aside(folder, next(fault for fault, _ in faults if fault))
    if of_first_rank(lambda: folders or sorted(checkpoints.glob("step-????????.damaged"))):
        raise CheckpointFailed(
            f"every checkpoint in '{checkpoints}' is damaged: choose another run_dir to begin from scratch, or delete "
            "that folder"
        )
    _remove_later_snapshots(run_dir, 0)
    return 0, [], SpikeMemory()


def _remove_later_snapshots(run_dir: Path, step: int) -> None:
    """Remove those of steps that are trained again: after another choice of batches or ranks they are of another
    training.
    """
    if dist.get_rank():
        return
    if later := [folder for folder in step_folders(run_dir, SNAPSHOTS) if step_of(folder) > step]:
        what = f"removes {count(len(later), 'snapshot')} of the averages after step {step}"
        print(f"{what}, where this start goes on", flush=True)
        for folder in later:
            shutil.rmtree(folder, ignore_errors=True)


def _set_aside(folder: Path, fault: str) -> None:
    aside = folder.with_suffix(".damaged")
    print(
        f"\nDAMAGED CHECKPOINT '{folder}': {fault}. "
        f"It is renamed to '{aside.name}', and the run resumes from the checkpoint before it.\n",
        file=sys.stderr,
    )
    with suppress(OSError):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _read(folder: Path) -> tuple[Checkpoint | None, str, str]:
    """A checkpoint whose contents are not verified yet, its damage, and why it cannot be read; '' for nothing."""
    try:
        return Checkpoint.read(folder), "", ""
    except ValueError as error:
        return None, str(error), ""
    except OSError as error:
        return None, "", reason(error)


def _restore(
    checkpoint: Checkpoint, config: Config, data: DataIdentity, engine: "Engine", ema: "EMA"
) -> tuple[int, list[dict], SpikeMemory]:
    rank, size = dist.get_rank(), engine.master.numel()
    reader = of_first_rank(checkpoint.reader)
    start, stop = rank * size, (rank + 1) * size
    same_parts = (reader.size, checkpoint.ranks) == (size, dist.get_world_size())
    moments = reader.moments_of_rank(rank) if same_parts else {}
    if not engine.fits(moments):  # another number of ranks, or another optimizer
        flat = reader.moments(start, stop)
        moments = engine.as_moments(*flat) if flat else {}
    schedule_step = checkpoint.manifest["schedule_step"]
    engine.restore(checkpoint.step, schedule_step, reader.read("master", start, stop), moments)
    for name, average in ema.averages.items():
        average.copy_(reader.read(name, start, stop))
    history, line = find_history(checkpoint, config, data, dist.get_world_size())
    memory = SpikeMemory(**(checkpoint.manifest.get("spikes") or {}))  # one from before spikes were judged has none
    if rank == 0:
        print(line, flush=True)
        if memory.batches:
            print(f"leaves out the batches {memory.batches} for spikes", flush=True)
    return checkpoint.step, history, memory


def find_history(checkpoint: Checkpoint, config: Config, data: DataIdentity, ranks: int) -> tuple[list[dict], str]:
    """The changes of the configuration from the run's first step to this start, and a line that tells the last ones.

    Each is {"step": the step after which it holds, "changes": {key: [before, now]}}.
    """
    manifest, step = checkpoint.manifest, checkpoint.step
    before = _comparable(manifest["config"], manifest["text"], checkpoint.ranks)
    now = _comparable(json.loads(json.dumps(asdict(config))), describe_text(data.text), ranks)
    changes = find_changes(before, now)
    if step == config.steps:
        end = f"all {step} steps are already made"
    else:
        end = rate_change(manifest["config"], asdict(config), manifest["schedule_step"]) if changes else ""
    changed = f" with {describe_changes(changes)}" if changes else ""
    line = f"resumes from step {step}{changed}{f': {end}' if end else ''}"
    return [*manifest["changes"], *([{"step": step, "changes": changes}] if changes else [])], line


def _comparable(config: dict, text: dict, ranks: int) -> dict:
    """What may change between two starts: the configuration, the embeddings and the number of ranks."""
    left_out = {"dry_run", "needs_gpu"} | (set() if config["lora"]["rank"] else {"init_from"})
    # What was no key yet has its default.
    filled = _with_defaults(config, asdict(Config()))
    kept = {key: value for key, value in filled.items() if key not in left_out}
    return kept | {"ranks": ranks, "embeddings": text}


def _with_defaults(config: dict, defaults: dict) -> dict:
    """A configuration as plain dicts, with the defaults of the keys that it lacks."""
    filled = defaults | config
    for key, default in defaults.items():
        if isinstance(default, dict) and default:  # a mixture has none
            filled[key] = _with_defaults(filled[key], default)
    return filled
