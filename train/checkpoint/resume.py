"""Resuming from the newest undamaged checkpoint, on any number of ranks."""

import hashlib
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from data.loader.dataset import Dataset
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import CheckpointFailed, latest_checkpoint, step_folders
from train.config import Config

if TYPE_CHECKING:  # the engine takes seconds to import, and check_resumable has no need of it
    from train.ema import EMA
    from train.engine import Engine


def identity(config: dict) -> dict[str, object]:
    """What a run may not change on its way, by key: the order of its samples and the layout of its files depend on it.

    config: as the manifest of a checkpoint holds it.
    """
    kept = {key: config[key] for key in ("seed", "global_batch", "diffusion_steps")}
    kept |= {f"model.{key}": value for key, value in config["model"].items()}
    # Without a rank there is no LoRA, and alpha changes nothing.
    kept["lora"] = config["lora"] if config["lora"]["rank"] else None
    kept |= {f"data.{key}": config["data"][key] for key in ("streams", "phases", "shuffle_block")}
    # The datasets may be moved.
    kept["data.mixture"] = {name: dataset["weight"] for name, dataset in config["data"]["mixture"].items()}
    return kept


def check_resumable(config: Config, samples: list[int]) -> None:
    """Make sure that the run can go on from its latest checkpoint, if it has one.

    The number of ranks may be another, and the optimizer 8-bit or not.
    Raises: ValueError if the checkpoint belongs to another run or other data.
    """
    checkpoint = Checkpoint.latest(Path(config.run_dir))
    if checkpoint is None:
        return
    folder = checkpoint.folder
    if checkpoint.manifest["samples"] != samples:
        raise ValueError(
            f"'{folder}' was trained on {checkpoint.manifest['samples']} samples, data.shards now has {samples}: "
            "give it the same shards, or begin anew in another run_dir"
        )
    if checkpoint.step > config.steps:
        raise ValueError(f"'{folder}' is beyond steps={config.steps}: raise steps, or choose another run_dir")
    there = identity(checkpoint.config)
    for key, here in identity(asdict(config)).items():
        if there.get(key) != here:
            raise ValueError(
                f"'{folder}' was trained with {key}={there.get(key)}, now it is {here}: "
                "set it back, or choose another run_dir"
            )


def check_same_everywhere(config: Config, datasets: list[Dataset]) -> None:
    """Make sure that all ranks see the same shards and the same latest checkpoint; a collective call.

    Raises: ValueError on all ranks if run_dir or data.shards is not shared between the nodes.
    """
    latest = latest_checkpoint(Path(config.run_dir))
    seen = (
        latest and latest.name,
        hashlib.sha256(
            repr([(shard.name, shard.count) for dataset in datasets for shard in dataset.shards]).encode()
        ).hexdigest(),
    )
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen)
    for what, i in ((f"run_dir={config.run_dir} (its latest checkpoint)", 0), (f"data.shards={config.data.shards}", 1)):
        other = [rank for rank, theirs in enumerate(everywhere) if theirs[i] != everywhere[0][i]]
        if other:
            raise ValueError(f"rank {other[0]} sees another {what} than rank 0: put it on storage that all nodes share")


def resume(run_dir: Path, engine: "Engine", ema: "EMA") -> int:
    """Restore the newest undamaged checkpoint and return its step, 0 if there is none; a collective call.

    Every rank checks its share of the files, then reads its own part of them: each byte is read twice in all. A damaged
    checkpoint is renamed to step-NNNNNNNN.damaged.
    Raises: CheckpointFailed if there are checkpoints, and all of them are damaged.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folders = step_folders(run_dir)
    if rank == 0:
        for unfinished in (run_dir / "checkpoints").glob("*.part"):  # left by a start that was killed as it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        (run_dir / "done").unlink(missing_ok=True)  # left by a start with fewer steps
    faults: list[str] = [""] * ranks
    for folder in _of_first_rank(folders):
        try:
            checkpoint = Checkpoint.read(folder)
            fault = checkpoint.verify(rank, ranks)
        except ValueError as error:
            fault = str(error)
        dist.all_gather_object(faults, fault)
        if not any(faults):
            return _restore(checkpoint, engine, ema)
        if rank == 0:
            aside = folder.with_suffix(".damaged")
            print(
                f"\nDAMAGED CHECKPOINT '{folder}': {next(filter(None, faults))}. "
                f"It is renamed to '{aside.name}', and the run resumes from the checkpoint before it.\n",
                file=sys.stderr,
            )
            with suppress(OSError):
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
    if any(faults):
        raise CheckpointFailed(
            f"every checkpoint in '{run_dir / 'checkpoints'}' is damaged: choose another run_dir to begin anew"
        )
    return 0


def _of_first_rank(folders: list[Path]) -> list[Path]:
    """The first rank's list, on all ranks: the others may see an older state of a shared folder."""
    lists = [folders]
    dist.broadcast_object_list(lists, src=0)
    return lists[0]


def _restore(checkpoint: Checkpoint, engine: "Engine", ema: "EMA") -> int:
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
    return checkpoint.step
