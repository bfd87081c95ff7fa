"""Checkpoints: RUN_DIR/checkpoints/step-NNNNNNNN, one file a rank and a manifest, whole or not there at all.

A rank's file holds its part of the fp32 masters, of their average and of the optimizer's moments. The masters of all
ranks, one after another, are the parameters in the manifest's order, flat, with some padding at the end. There is
nothing else to keep: every random draw and the place in the data follow from the step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.config import Dataset
from data.tars import write_json
from data.text import TextMeta
from train.config import Config

if TYPE_CHECKING:  # the engine takes seconds to import, and check_resumable has no need of it
    from train.ema import EMA
    from train.engine import Engine

MANIFEST = "manifest.json"
# What decides the order of the samples and the layout of the files; a run can't change these on its way.
IDENTITY = (
    "seed",
    "global_batch",
    "diffusion_steps",
    "model",
    "optim.name",
    "data.streams",
    "data.phases",
    "data.shuffle_block",
    "data.mixture",
)


def save(
    run_dir: Path, step: int, engine: "Engine", ema: "EMA", config: Config, samples: list[int], meta: TextMeta
) -> None:
    """Write a checkpoint aside from all ranks, then rename it; a collective call.

    meta: of the embeddings that the run trains on; whoever samples from the checkpoint reads it there.
    Raises: OSError on all ranks if one of them could not write; the checkpoint before is untouched.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_suffix(".part")

    def write() -> None:
        aside.mkdir(parents=True, exist_ok=True)
        moments = {f"moments.{name}": value for name, value in engine.moments.items()}
        save_file({"master": engine.master.detach(), "ema": ema.average, **moments}, aside / _file(rank))

    def publish() -> None:
        write_json(
            aside / MANIFEST,
            {
                "step": step,
                "ranks": ranks,
                "samples": samples,
                "text": asdict(meta),
                "parameters": {name: list(p.shape) for name, p in engine.model.named_parameters()},
                # By name: a rank whose file is not here wrote to a disk of its own.
                "files": {_file(r): (aside / _file(r)).stat().st_size for r in range(ranks)},
                "schedule_step": engine.schedule_step,
                "config": asdict(config),
            },
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for old in complete(run_dir)[: -config.keep_checkpoints]:
            shutil.rmtree(old)

    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    _together(lambda: None, aside)
    _together(write, aside)
    _together(publish if rank == 0 else lambda: None, aside)


def _together(action: Callable[[], None], where: Path) -> None:
    """Do it on this rank, wait for the others, and fail on all if it failed on one: nobody is left waiting."""
    problem = ""
    try:
        action()
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        problem = f"rank {dist.get_rank()}: {error}"
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise OSError(
            f"the checkpoint '{where}' could not be written ({next(filter(None, problems))}); the one before is intact"
        )


def complete(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first: those whose manifest and files are all there."""
    return [path for path in sorted((run_dir / "checkpoints").glob("step-????????")) if _is_whole(path)]


def _is_whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def check_resumable(config: Config, samples: list[int], ranks: int) -> None:
    """Make sure that the run can go on from its latest checkpoint, if it has one.

    Raises: ValueError if that belongs to another run, other data or another number of ranks.
    """
    for folder in complete(Path(config.run_dir))[-1:]:
        manifest, now = read_manifest(folder), json.loads(json.dumps(asdict(config)))
        if manifest["ranks"] != ranks:
            raise ValueError(
                f"'{folder}' was written by {manifest['ranks']} ranks, this run has {ranks}: "
                f"start {manifest['ranks']} ranks, or begin anew in another run_dir"
            )
        if manifest["samples"] != samples:
            raise ValueError(
                f"'{folder}' was trained on {manifest['samples']} samples, data.shards now has {samples}: "
                "give it the same shards, or begin anew in another run_dir"
            )
        if manifest["step"] > config.steps:
            raise ValueError(f"'{folder}' is beyond steps={config.steps}: raise steps, or choose another run_dir")
        for key in IDENTITY:
            there, here = _get(manifest["config"], key), _get(now, key)
            if there != here:
                raise ValueError(
                    f"'{folder}' was trained with {key}={there}, now it is {here}: "
                    "set it back, or choose another run_dir"
                )


def check_same_everywhere(config: Config, datasets: list[Dataset]) -> None:
    """Make sure that all ranks see the same shards and the same latest checkpoint; a collective call.

    Raises: ValueError on all ranks if run_dir or data.shards is not shared between the nodes.
    """
    seen = (
        [folder.name for folder in complete(Path(config.run_dir))[-1:]],
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
    """Go on from the latest whole checkpoint; returns its step, 0 if there is none."""
    for folder in complete(run_dir)[-1:]:
        manifest = read_manifest(folder)
        step: int = manifest["step"]
        state = load_file(folder / _file(dist.get_rank()))
        moments = {name.removeprefix("moments."): value for name, value in state.items() if name.startswith("moments.")}
        engine.restore(step, manifest["schedule_step"], state["master"], moments)
        ema.average.copy_(state["ema"])
        return step
    return 0


def _get(config: dict, key: str) -> object:
    if key == "model":  # how its memory is spent changes nothing that is kept
        return {name: value for name, value in config["model"].items() if name != "memory"}
    if key == "data.mixture":  # where the datasets lie may change
        return {name: dataset["weight"] for name, dataset in config["data"]["mixture"].items()}
    for part in key.split("."):
        config = config[part]
    return config


def load_weights(folder: Path, name: str = "ema") -> dict[str, Tensor]:
    """The whole fp32 state dict from the parts of all ranks; name: 'ema' or 'master'.

    Raises: ValueError if the checkpoint isn't whole.
    """
    if not _is_whole(folder):
        raise ValueError(f"'{folder}' is not a whole checkpoint: name a step-NNNNNNNN folder of a run")
    manifest = read_manifest(folder)
    parts = _parts(folder, manifest["ranks"], name)
    flat = torch.cat(list(parts))
    weights, start = {}, 0
    for parameter, shape in manifest["parameters"].items():
        weights[parameter] = flat[start : start + prod(shape)].view(shape)
        start += prod(shape)
    return weights


def _parts(folder: Path, ranks: int, name: str) -> Iterator[Tensor]:
    for rank in range(ranks):
        with safe_open(folder / _file(rank), framework="pt") as file:
            yield file.get_tensor(name)


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
