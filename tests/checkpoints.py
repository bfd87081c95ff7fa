"""Runs without a training, for tests: a checkpoint of a random net, as the trainer leaves it."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from data.config import DataConfig
from data.text.meta import TextMeta
from model.config import UNetConfig
from model.super_resolution import make_net
from model.unet import UNet
from train.checkpoint.format import MANIFEST, file_sha256, part_file, sealed, step_folder
from train.config import Config
from train.weights.power_average import TRACKED


def random_net(config: UNetConfig, seed: int) -> UNet:
    """Every parameter random: fresh, the last layers are zero, and two nets would agree on nothing but that."""
    torch.manual_seed(seed)
    unet = make_net(config)
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return unet.requires_grad_(False)


def write_run(run_dir: Path, net: UNetConfig, embeddings: Path, **settings: object) -> Path:
    """A run whose only checkpoint, of step 7 by two ranks, holds random_net(net, 1) and as its average (net, 2).

    settings: of the run's Config; with ema_snapshot_every the power-function averages are (net, 3) and (net, 4).
    """
    names = ("master", "ema", *(TRACKED if settings.get("ema_snapshot_every") else ()))
    nets = {name: random_net(net, seed) for seed, name in enumerate(names, 1)}
    data = settings.pop("data", DataConfig(text=str(embeddings)))
    config = Config(run_dir=str(run_dir), model=net, data=data, **{"precision": "fp32"} | settings)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, unet in nets.items():
        flat = torch.cat([p.flatten() for p in unet.parameters()])
        padded = torch.cat([flat, torch.full((len(flat) % 2 + 2,), 1e9)])
        for rank, part in enumerate(padded.chunk(2)):
            parts[rank][name] = part.clone()
    parameters = {name: list(p.shape) for name, p in nets["ema"].named_parameters()}
    described = {"text": asdict(TextMeta.read(embeddings)), "config": asdict(config)}
    write_checkpoint(step_folder(run_dir, 7), parts, parameters, step=7, schedule_step=7, **described)
    return run_dir


def write_checkpoint(
    folder: Path, parts: list[dict[str, torch.Tensor]], parameters: Mapping[str, list[int]], **manifest: object
) -> Path:
    """A checkpoint's folder.  parts: the tensors of each rank."""
    folder.mkdir(parents=True)
    for rank, part in enumerate(parts):
        save_file(part, folder / part_file(rank))
    unknown = {"schedule_step": manifest["step"], "samples": [1000], "data": ["0" * 32], "base": "", "changes": []}
    manifest = unknown | manifest | {"ranks": len(parts), "parameters": parameters}
    return write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> Path:
    """The manifest of the files that lie in the folder."""
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    hashes = {name: file_sha256(folder / name) for name in files}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest | {"files": files, "sha256": hashes})))
    return folder


def changed_run(run_dir: Path, to: Path, change: Callable[[dict], object] = lambda manifest: None) -> Path:
    """A copy of a run of write_run, its manifest changed; returns the folder of its checkpoint."""
    shutil.copytree(run_dir, to)
    folder = step_folder(to, 7)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    return write_manifest(folder, manifest)


_listeners: list[list[str]] = []


@contextmanager
def opened_manifests() -> Iterator[list[str]]:
    """The manifests that this process opens within the block, by whatever function."""
    _install_hook()
    opened: list[str] = []
    _listeners.append(opened)
    try:
        yield opened
    finally:
        _listeners.remove(opened)


@cache
def _install_hook() -> None:
    """Once, for a hook stays as long as the process."""
    sys.addaudithook(_watch)


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith(MANIFEST):
        for opened in _listeners:
            opened.append(str(arguments[0]))
