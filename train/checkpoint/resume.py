"""Resuming from the newest undamaged checkpoint, on any number of ranks."""

import hashlib
import json
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from data.cli import reason
from data.loader.dataset import Dataset
from train.checkpoint.changes import describe_changes, find_changes, rate_change
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import CheckpointFailed, latest_checkpoint, step_folders
from train.checkpoint.identity import DataIdentity, check_same_run
from train.config import Config

if TYPE_CHECKING:  # the engine takes seconds to import, and check_resumable has no need of it
    from train.ema import EMA
    from train.engine import Engine


def check_resumable(config: Config, data: DataIdentity) -> None:
    """Make sure that the run can go on from its latest checkpoint, if it has one.

    The number of ranks may be another, and the optimizer 8-bit or not.
    Raises: ValueError if the checkpoint belongs to another run or other data.
    """
    checkpoint = Checkpoint.latest(Path(config.run_dir))
    if checkpoint is None:
        return
    folder = checkpoint.folder
    check_same_run(str(folder), checkpoint.manifest, asdict(config), data)
    if checkpoint.step > config.steps:
        raise ValueError(f"'{folder}' is beyond steps={config.steps}: raise steps, or choose another run_dir")


def check_same_everywhere(config: Config, datasets: list[Dataset], digests: list[str | None]) -> None:
    """Make sure that all ranks see the same shards and the same latest checkpoint; a collective call.

    digests: data_digest of each dataset, None where it is not known to this rank.
    Raises: ValueError on all ranks if run_dir or data.shards is not shared between the nodes.
    """
    latest = latest_checkpoint(Path(config.run_dir))
    names = repr([(shard.name, shard.count) for dataset in datasets for shard in dataset.shards])
    seen = (latest and latest.name, hashlib.sha256(names.encode()).hexdigest(), digests)
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen)
    first_latest, first_names, first_digests = everywhere[0]
    for rank, (their_latest, their_names, their_digests) in enumerate(everywhere):
        what = ""
        if their_latest != first_latest:
            what = f"run_dir={config.run_dir} (its latest checkpoint)"
        elif their_names != first_names or not _agree(first_digests, their_digests):
            what = f"data.shards={config.data.shards}"
        if what:
            raise ValueError(f"rank {rank} sees another {what} than rank 0: put it on storage that all nodes share")


def _agree(digests: list[str | None], others: list[str | None]) -> bool:
    return all(mine == theirs for mine, theirs in zip(digests, others, strict=True) if mine and theirs)


def resume(config: Config, data: DataIdentity, engine: "Engine", ema: "EMA") -> tuple[int, list[dict]]:
    """Restore the newest undamaged checkpoint; a collective call.

    Every rank checks its share of the files, then reads its own part of them: each byte is read twice in all. A damaged
    checkpoint is renamed to step-NNNNNNNN.damaged. The first rank prints from which step the run goes on, and with what
    changes.
    Returns its step, 0 if there is none, and the changes of the configuration on the way there and now, as find_history
    makes them.
    Raises: CheckpointFailed if there are checkpoints, and all of them are damaged or one cannot be read.
    """
    rank, ranks, run_dir = dist.get_rank(), dist.get_world_size(), Path(config.run_dir)
    checkpoints = run_dir / "checkpoints"
    folders = step_folders(run_dir)
    if rank == 0:
        for unfinished in checkpoints.glob("*.part"):  # left by a start that was killed as it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        (run_dir / "done").unlink(missing_ok=True)  # left by a start with fewer steps
    faults: list[tuple[str, str]] = [("", "")] * ranks
    for folder in _of_first_rank(folders):
        fault = unreadable = ""
        try:
            checkpoint = Checkpoint.read(folder)
            fault = checkpoint.verify(rank, ranks)
        except ValueError as error:
            fault = str(error)
        except OSError as error:
            unreadable = reason(error)
        dist.all_gather_object(faults, (fault, unreadable))
        if problem := next((unreadable for _, unreadable in faults if unreadable), ""):
            raise CheckpointFailed(
                f"the checkpoint '{folder}' cannot be read ({problem}), which is no damage of it: repair the storage "
                "or raise the limit, then run the same command; or move that folder away to resume from the one before"
            )
        if not any(fault for fault, _ in faults):
            return _restore(checkpoint, config, data, engine, ema)
        if rank == 0:
            _set_aside(folder, next(fault for fault, _ in faults if fault))
    if _of_first_rank(folders or sorted(checkpoints.glob("step-????????.damaged"))):
        raise CheckpointFailed(
            f"every checkpoint in '{checkpoints}' is damaged: choose another run_dir to begin from scratch, or delete "
            "that folder"
        )
    return 0, []


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


def _of_first_rank(folders: list[Path]) -> list[Path]:
    """The first rank's list, on all ranks: the others may see an older state of a shared folder."""
    lists = [folders]
    dist.broadcast_object_list(lists, src=0)
    return lists[0]


def _restore(
    checkpoint: Checkpoint, config: Config, data: DataIdentity, engine: "Engine", ema: "EMA"
) -> tuple[int, list[dict]]:
    rank, reader, size = dist.get_rank(), checkpoint.reader(), engine.master.numel()
    start, stop = rank * size, (rank + 1) * size
    same_parts = (reader.size, checkpoint.ranks) == (size, dist.get_world_size())
    moments = reader.moments_of_rank(rank) if same_parts else {}
    if not engine.fits(moments):  # another number of ranks, or another optimizer
        flat = reader.moments(start, stop)
        moments = engine.as_moments(*flat) if flat else {}
    schedule_step = checkpoint.manifest["schedule_step"]
    engine.restore(checkpoint.step, schedule_step, reader.read("master", start, stop), moments)
    ema.average.copy_(reader.read("ema", start, stop))
    history, line = find_history(checkpoint, config, data, dist.get_world_size())
    if rank == 0:
        print(line, flush=True)
    return checkpoint.step, history


def find_history(checkpoint: Checkpoint, config: Config, data: DataIdentity, ranks: int) -> tuple[list[dict], str]:
    """The changes of the configuration from the run's first step to this start, and a line that tells the last ones.

    Each is {"step": the step after which it holds, "changes": {key: [before, now]}}.
    """
    manifest, step = checkpoint.manifest, checkpoint.step
    before = _comparable(manifest["config"], manifest["text"], checkpoint.ranks)
    now = _comparable(json.loads(json.dumps(asdict(config))), asdict(data.text), ranks)
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
    kept = {key: value for key, value in config.items() if key not in left_out}
    return kept | {"ranks": ranks, "embeddings": text}
