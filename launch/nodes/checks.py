"""What a rank finds out about its own node."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from data.device import uses_gpu
from data.storage.locations import is_remote, open_location, split
from data.storage.machine import check_open_files
from data.storage.shards import is_folder
from data.text.meta import caption_folder, sidecar_location
from launch.cost.traffic import checkpoint_bytes
from train.checkpoint.format import SNAPSHOTS, step_folders
from train.compose import ROOT
from train.config import Config
from train.inputs import find_inputs
from train.monitor.memory import WEIGHT_BYTES, averages_of, snapshot_bytes, states
from train.summary import parameters

LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "numpy", "pillow", "safetensors", "omegaconf")
FOLDERS = ("train", "model", "data", "launch", "conf")
# Of a GPU's memory; less is free only where another process uses it.
FREE_SHARE = 0.95
# Reading is measured for so many bytes or seconds, whichever ends first.
READ_BYTES, READ_SECONDS, CHUNK = 256 * 2**20, 5.0, 2**20


def code_hash() -> str:
    """A hash of all sources and configurations, committed or not."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers and files depend on."""
    numbers = {"python": platform.python_version()}
    numbers |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        numbers |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return numbers


def devices(local_rank: int) -> tuple[str, list[str]]:
    """The node's devices in words, and what is wrong with this rank's."""
    if not uses_gpu():
        return "CPU", []
    free, total = torch.cuda.mem_get_info(local_rank)
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(local_rank)}, {total / 2**30:.0f} GiB"
    if free < FREE_SHARE * total:
        return name, [
            f"GPU {local_rank} has {(total - free) / 1e9:.1f} GB in use by other processes: end those that nvidia-smi "
            "lists, or leave the node out"
        ]
    return name, []


def read_rate(config: Config, needed: float) -> tuple[float, list[str]]:
    """Bytes/s at which this node reads shards and their embeddings, and what is wrong.  needed: bytes/s."""
    try:
        inputs = find_inputs(config, readable_only=True)
    except (OSError, ValueError) as error:
        return 0.0, [f"{error}{_seems_unmounted(config)}"]
    shards = [(shard, dataset) for dataset in inputs.datasets for shard in dataset.shards if shard.count]
    # Every node begins with another shard, so that they don't all measure one server's cache.
    first = dist.get_rank() * len(shards) // dist.get_world_size() if dist.is_initialized() else 0
    start, read, online = time.perf_counter(), 0, config.text.mode == "online"
    for shard, dataset in shards[first:] + shards[:first]:
        folders = [] if online else [caption_folder(dataset.text, caption) for caption in dataset.fields]
        for location in (shard.location, *(sidecar_location(shard, folder) for folder in folders)):
            try:
                with open_location(location) as file:
                    while chunk := file.read(CHUNK):
                        read += len(chunk)
                        if time.perf_counter() - start > READ_SECONDS or read > READ_BYTES:
                            break
            except OSError as error:
                return 0.0, [f"'{location}' cannot be read: {error}"]
        if time.perf_counter() - start > READ_SECONDS or read > READ_BYTES:
            break
    rate = read / (time.perf_counter() - start)
    if rate < needed:
        return rate, [
            f"reads {rate / 1e6:.1f} MB/s of shards and embeddings in one stream, the plan needs {needed / 1e6:.1f} "
            "MB/s a node: mount faster storage, or encode captions online"
        ]
    return rate, []


def _seems_unmounted(config: Config) -> str:
    """What to look at if a local folder of the data is missing, empty or unreadable here, '' if none is."""
    data = config.data
    given = [(one.shards, one.text) for one in data.datasets()] + [(data.validation.shards, data.validation.text)]
    for where in filter(None, sum(given, ())):
        folder = where if is_folder(where) else split(where)[0]
        try:
            unmounted = not is_remote(where) and not os.listdir(folder or ".")
        except OSError:
            unmounted = True
        if unmounted:
            return f"; or the storage of '{folder}' is not mounted on this node"
    return ""


def disk_faults(config: Config, ranks: int) -> list[str]:
    """What is wrong with run_dir as this node sees it: it cannot be made, or lacks space for the checkpoints."""
    run_dir = Path(config.run_dir)
    trained, frozen = parameters(config)
    resident = states(trained, ranks, config.optim.name, WEIGHT_BYTES[config.precision], frozen, averages_of(config))
    one = checkpoint_bytes(resident, ranks)
    every = config.ema_snapshot_every
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        # The steps are not known where the data, which they may follow, cannot be read.
        snapshots = max(config.steps // every - len(step_folders(run_dir, SNAPSHOTS)), 0) if every else 0
    except OSError as error:
        return [f"run_dir={run_dir} cannot be made: {error}"]
    needed = (config.keep_checkpoints + 1) * one + snapshots * ranks * snapshot_bytes(trained, ranks)
    if free < needed:
        beside = f" and {snapshots:,} snapshots of averages" if snapshots else ""
        return [
            f"run_dir={run_dir} has {free / 1e9:.1f} GB free, and {config.keep_checkpoints} checkpoints and one being "
            f"written{beside} take {needed / 1e9:.1f} GB: free some space, or lower keep_checkpoints"
            f"{' or raise ema_snapshot_every' if snapshots else ''}"
        ]
    return []


def open_files_faults(config: Config, ranks: int) -> list[str]:
    """What is wrong with this node's limit of open files, which a training raises as far as it may."""
    try:
        check_open_files(config.data.workers, ranks)
    except OSError as error:
        return [str(error)]
    return []


def shared_run_dir_faults(config: Config, names: list[str]) -> list[str]:
    """Where run_dir is not shared: each rank looks for a file that the first one wrote; a collective call.

    names: of each rank's node.  Returns the faults of all ranks, on every rank.
    """
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    written = Path(config.run_dir) / f".preflight-{token[0]}"
    problem = ""
    if dist.get_rank() == 0:
        try:
            written.write_text(token[0])
        except OSError as error:
            problem = f"run_dir={config.run_dir} cannot be written: {error}"
    dist.barrier()
    if not problem:
        try:
            # The folder is listed, since some network file systems remember that a name was missing.
            if not written.parent.is_dir() or written.name not in os.listdir(written.parent):
                problem = f"run_dir={config.run_dir} is not the one that {names[0]} sees: all nodes must share it"
        except OSError as error:
            problem = f"run_dir={config.run_dir} cannot be read: {error}"
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if dist.get_rank() == 0:
        written.unlink(missing_ok=True)
    return list(dict.fromkeys(f"{name}: {text}" for name, text in zip(names, problems, strict=True) if text))
