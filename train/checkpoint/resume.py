"""Going on from the latest undamaged checkpoint, on any number of ranks."""

import hashlib
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from data.loader.dataset import Dataset
from train.checkpoint.format import CheckpointFailed, complete_checkpoints, find_fault, read_manifest
from train.checkpoint.reader import CheckpointReader
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
    for folder in complete_checkpoints(Path(config.run_dir))[-1:]:
        manifest = read_manifest(folder)
        if manifest["samples"] != samples:
            raise ValueError(
                f"'{folder}' was trained on {manifest['samples']} samples, data.shards now has {samples}: "
                "give it the same shards, or begin anew in another run_dir"
            )
        if manifest["step"] > config.steps:
            raise ValueError(f"'{folder}' is beyond steps={config.steps}: raise steps, or choose another run_dir")
        there = identity(manifest["config"])
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
    seen = (
        [folder.name for folder in complete_checkpoints(Path(config.run_dir))[-1:]],
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
    """Go on from the latest undamaged checkpoint; returns its step, 0 if there is none. A collective call.

    Every rank checks its share of the files, then reads the part that is its own: of each byte, two reads in all.
    Raises: CheckpointFailed if there are checkpoints, and all of them are damaged.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folders = sorted((run_dir / "checkpoints").glob("step-????????"), reverse=True)
    if rank == 0:
        for left in (run_dir / "checkpoints").glob("*.part"):  # of a start that was killed as it saved
            shutil.rmtree(left, ignore_errors=True)
        (run_dir / "done").unlink(missing_ok=True)  # of a start with fewer steps
    faults: list[str] = [""] * ranks
    for folder in _from_first(folders):
        dist.all_gather_object(faults, find_fault(folder, rank, ranks))
        if not any(faults):
            return _restore(folder, engine, ema)
        if rank == 0:
            aside = folder.with_suffix(".damaged")
            told = f"DAMAGED CHECKPOINT '{folder}': {next(filter(None, faults))}"
            print(f"\n{told}. It becomes '{aside.name}', and the run goes on from the one before.\n", file=sys.stderr)
            with suppress(OSError):
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
    if any(faults):
        raise CheckpointFailed(
            f"none of the checkpoints in '{run_dir / 'checkpoints'}' is undamaged: choose another run_dir to begin anew"
        )
    return 0


def _from_first(folders: list[Path]) -> list[Path]:
    """The first rank's, for all: the others may list a shared folder a moment older."""
    lists = [folders]
    dist.broadcast_object_list(lists, src=0)
    return lists[0]


def _restore(folder: Path, engine: "Engine", ema: "EMA") -> int:
    manifest, rank = read_manifest(folder), dist.get_rank()
    parts, size = CheckpointReader(folder, manifest["ranks"]), engine.master.numel()
    own = slice(rank * size, (rank + 1) * size)
    moments = parts.own(rank) if (parts.size, manifest["ranks"]) == (size, dist.get_world_size()) else {}
    if not engine.fits(moments):  # other ranks, or another optimizer
        flat = parts.moments(own.start, own.stop)
        moments = engine.as_moments(*flat) if flat else {}
    engine.restore(manifest["step"], manifest["schedule_step"], parts.read("master", own.start, own.stop), moments)
    ema.average.copy_(parts.read("ema", own.start, own.stop))
    return manifest["step"]
