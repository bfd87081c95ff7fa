"""Weights to begin from, under our names: a released file, a diffusers folder, or a checkpoint of this repository."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.text.meta import TextMeta
from model.config import UNetConfig
from model.convert import from_diffusers, merge_lora, to_diffusers
from model.unet import UNet
from train.checkpoint.format import MANIFEST, complete_checkpoints, read_manifest
from train.checkpoint.reader import load_weights
from train.weights.lora import trained_adapter

SHOWN = 3


def find_checkpoint(path: str | Path) -> Path:
    """The step's folder itself, or a run's latest whole checkpoint.

    Raises: ValueError if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for folder in complete_checkpoints(path)[-1:]:
        return folder
    raise ValueError(
        f"'{path}' has no whole checkpoint: name the folder of a run, or a step-NNNNNNNN folder in its checkpoints"
    )


@dataclass(slots=True)
class Trained:
    """What a checkpoint says of itself; run: the configuration it was trained with, as plain dicts."""

    folder: Path
    manifest: dict
    step: int
    model: UNetConfig
    diffusion_steps: int

    @property
    def run(self) -> dict:
        return self.manifest["config"]

    @property
    def text(self) -> TextMeta:
        """Of the embeddings it was trained on.  Raises: ValueError if neither it nor the run's data.text says it."""
        if "text" not in self.manifest:  # of a version that did not write it
            return TextMeta.read(self.run["data"]["text"])
        try:
            return TextMeta(**self.manifest["text"])
        except TypeError as error:
            raise ValueError(f"what the manifest says of the text encoder is not of this version ({error})") from None

    def load(self, weights: str, device: torch.device, dtype: torch.dtype = torch.float32) -> UNet:
        """The net with its 'ema' or 'master' weights, for sampling.

        Raises: ValueError if the checkpoint isn't whole, or its weights are of another net than it says.
        """
        with torch.device("meta"):
            unet = UNet(self.model)
        state = load_whole(self.folder, weights)
        _check_fit(state, unet.state_dict(), self.folder)
        unet.load_state_dict(state, strict=True, assign=True)
        return unet.to(device, dtype).eval().requires_grad_(False)


def read_trained(path: str | Path) -> Trained:
    """A run's latest whole checkpoint, or the step's folder itself.

    Raises: ValueError if there is none, or it is not of this version.
    """
    folder = find_checkpoint(path)
    try:
        manifest = read_manifest(folder)
        run = manifest["config"]
        model = UNetConfig(**run["model"])
        return Trained(folder, manifest, int(manifest["step"]), model, int(run["diffusion_steps"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the manifest in '{folder}' is not one of this version ({error!r})") from None


def load_whole(folder: Path, name: str = "ema") -> dict[str, Tensor]:
    """The net's weights of a checkpoint; of one that was fine-tuned by LoRA, that merged into what it began from.

    Raises: ValueError if it isn't whole, or the net that it began from isn't there.
    """
    run = read_manifest(folder)["config"]
    if not run.get("lora", {}).get("rank"):
        return load_weights(folder, name)
    model = UNetConfig(**run["model"])
    adapter = trained_adapter(folder, name, run, model)
    return merge_lora(load_pretrained(run["init_from"], model), adapter.lora, adapter.scale, model)


def load_pretrained(path: str | Path, config: UNetConfig) -> dict[str, Tensor]:
    """The state dict of the config's net from what lies at the path, on the CPU, in the dtype it is stored in.

    path: a .safetensors, .pt or .bin file or an .index.json of shards, under the released names or diffusers';
    the folder of a diffusers pipeline or UNet, of whose copies the fullest precision is read; a run or one of its
    checkpoints, whose average is read.
    Raises: ValueError if nothing can be read there, or names the first weights that don't fit.
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
        raise ValueError(f"no weights at '{path}': name a file or folder on this machine, downloaded before")
    if path.is_file():
        return _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for folder in (path / "unet", path):
        for file in _diffusers_files(folder):
            return _read(file)
    try:
        return load_whole(find_checkpoint(path))
    except ValueError as error:
        raise ValueError(
            f"'{path}' holds no diffusion_pytorch_model.*, no unet/ with one, and no checkpoint ({error}): "
            "name such a folder, or the file of the weights itself"
        ) from None


def _diffusers_files(folder: Path) -> list[Path]:
    """The files or indices that diffusers may have saved a net in, the fullest precision first."""
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
    """Nothing but tensors is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in its reader
        raise ValueError(
            f"'{path}' cannot be read as weights ({repr(error)[:200]}): it is damaged, or holds more than tensors; "
            "fetch it again, or save its tensors by name as .safetensors"
        ) from None
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else ["-"]
    if odd:
        raise ValueError(
            f"'{path}' is not a dict of names and tensors (first that is none: {odd[0]!r}): "
            "save the net's state dict alone"
        )
    return state


def _without_idle_variance(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Undo what train.export adds to a net without a learned variance: output channels that are all zero."""
    parts = [f"{layer}.{kind}" for layer in ("out.2", "conv_out") for kind in ("weight", "bias")]
    there = {name: state[name].split(config.in_channels) for name in parts if name in state}
    if config.learn_sigma or not all(len(values) == 2 and not values[1].any() for values in there.values()):
        return state
    return state | {name: values[0] for name, values in there.items()}


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
    told = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])})" for kind, names in faults.items() if names]
    if told:
        raise ValueError(
            f"the weights in '{path}' don't fit the net: {'; '.join(told)}: "
            "set model to the net that they are of and embed the captions with its encoder, or name other weights"
        )
