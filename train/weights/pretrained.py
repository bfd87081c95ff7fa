"""Weights to start from, under our names: a released file, a diffusers folder, or a checkpoint of this repository."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import UNetConfig
from model.convert import from_diffusers, merge_lora, to_diffusers
from model.unet import UNet
from train.checkpoint.checkpoint import Checkpoint
from train.weights.lora import trained_adapter

# An error names at most this many weights or files.
SHOWN = 3


def net_weights(checkpoint: Checkpoint, name: str = "ema") -> dict[str, Tensor]:
    """The state dict of a checkpoint's net; a LoRA that the run trained is merged into the net it started from.

    name: 'ema' or 'master'.
    Raises: ValueError if the files are not intact, are of another net, or the net that the run started from is missing.
    """
    if checkpoint.config["lora"]["rank"]:
        adapter = trained_adapter(checkpoint, name)
        weights = load_pretrained(checkpoint.config["init_from"], checkpoint.model)
        return merge_lora(weights, adapter.lora, adapter.scale, checkpoint.model)
    with torch.device("meta"):
        net = UNet(checkpoint.model).state_dict()
    weights = checkpoint.weights(name)
    _check_fit(weights, net, checkpoint.folder)
    return weights


def load_pretrained(path: str | Path, config: UNetConfig) -> dict[str, Tensor]:
    """Read weights from a path as a state dict of the config's net, on the CPU, in the dtype they are stored in.

    path: a .safetensors, .pt or .bin file or an .index.json of shards, under the released names or diffusers'; the
    folder of a diffusers pipeline or UNet, where the copy of the highest precision is read; a run or one of its
    checkpoints, where the moving average is read.
    Raises: ValueError if nothing can be read there, or the weights don't fit the net; it names the first of them.
    """
    path = Path(path)
    state = _read(path)
    with torch.device("meta"):
        ours = UNet(config).state_dict()
    theirs = to_diffusers(ours, config)
    is_diffusers = bool(state.keys() & theirs.keys())
    state = _without_idle_variance(state, config)
    _check_fit(state, theirs if is_diffusers else ours, path)
    return from_diffusers(state, config) if is_diffusers else state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"no weights at '{path.absolute()}': download them first, and name the file or folder")
    if path.is_file():
        return _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for folder in (path / "unet", path):
        for file in _diffusers_files(folder):
            return _read(file)
    try:
        return net_weights(Checkpoint.open(path))
    except ValueError as error:
        raise ValueError(
            f"'{path}' holds no diffusion_pytorch_model.*, no unet/ with one, and no checkpoint ({error}): "
            "name such a folder, or the file of the weights itself"
        ) from None


def _diffusers_files(folder: Path) -> list[Path]:
    """The files or indices that diffusers may have saved a net in, the highest precision first."""
    name = "diffusion_pytorch_model"
    candidates = [
        folder / file
        for variant in ("", ".fp16", ".bf16")
        for kind in ("safetensors", "bin")
        for file in (f"{name}{variant}.{kind}", f"{name}.{kind}.index{variant}.json")
    ]
    return [file for file in candidates if file.is_file()]


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"'{index}' is not an index of shards (no weight_map): name the file of the weights") from None
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise ValueError(
            f"'{index}' names {len(files)} shards, {len(absent)} of them are not beside it "
            f"({', '.join(absent[:SHOWN])}): copy or download them too"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_file(index.parent / file)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; nothing else is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the library that reads it
        raise ValueError(
            f"'{path}' cannot be read as weights ({repr(error)[:200]}): it is damaged, or holds more than tensors; "
            "fetch it again, or save its tensors by name as .safetensors"
        ) from None
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else ["-"]
    if odd:
        raise ValueError(
            f"'{path}' is not a dict of names and tensors (first entry that is no tensor: {odd[0]!r}): "
            "save the net's state dict alone"
        )
    return state


def _without_idle_variance(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The weights without the output channels, all zero, that train.export adds to a net without a learned variance."""
    parts = [f"{layer}.{kind}" for layer in ("out.2", "conv_out") for kind in ("weight", "bias")]
    outputs = {name: state[name].split(config.in_channels) for name in parts if name in state}
    if config.learn_sigma or not all(len(values) == 2 and not values[1].any() for values in outputs.values()):
        return state
    return state | {name: values[0] for name, values in outputs.items()}


def _check_fit(state: dict[str, Tensor], net: dict[str, Tensor], path: Path) -> None:
    faults = {
        "missing": [name for name in net if name not in state],
        "unexpected": [name for name in state if name not in net],
        "of another shape": [
            f"{name} is {list(state[name].shape)}, the net's {list(net[name].shape)}"
            for name in net
            if name in state and state[name].shape != net[name].shape
        ],
    }
    problems = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])})" for kind, names in faults.items() if names]
    if problems:
        raise ValueError(
            f"the weights in '{path}' don't fit the net: {'; '.join(problems)}: "
            "set model to the net that they are of and embed the captions with its encoder, or name other weights"
        )
