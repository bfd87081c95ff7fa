"""Weights to start from, under our names: a released file, a diffusers folder, or a checkpoint of this repository."""

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.storage.hub import hub_name, pinned
from data.storage.hub_files import fetch
from model.config import UNetConfig
from model.convert import from_diffusers, merge_lora, to_diffusers
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.identity import weights_digest
from train.weights.lora import trained_adapter, unet_on_meta
from train.weights.prefixes import SHOWN, flatten, take_off_prefix

logger = logging.getLogger(__name__)

# What decides what a net makes of its weights, and does not show in their shapes.
SHAPELESS = ("norm_groups", "num_head_channels", "att_pool_heads", "scale_skip_connection")

# The files or indices that diffusers may have saved a net in, below its folder, the highest precision first.
DIFFUSERS_FILES = [
    f"{folder}diffusion_pytorch_model{end}"
    for folder in ("unet/", "")
    for variant in ("", ".fp16", ".bf16")
    for kind in ("safetensors", "bin")
    for end in (f"{variant}.{kind}", f".{kind}.index{variant}.json")
]


def net_weights(checkpoint: Checkpoint, name: str = "ema") -> dict[str, Tensor]:
    """The state dict of a checkpoint's net; a LoRA that the run trained is merged into the net it started from.

    name: 'ema' or 'master'.
    Raises: ValueError if the files are not intact, are of another net, or the net that the run started from is missing
    or has other weights by now.
    """
    if checkpoint.config["lora"]["rank"]:
        path = checkpoint.config["init_from"]
        weights = load_pretrained(path, checkpoint.model)
        if weights_digest(weights) != checkpoint.manifest["base"]:
            raise ValueError(
                f"'{path}' has other weights than when the LoRA in '{checkpoint.folder}' was trained on them; if it is "
                "a run, it may have trained on: put the earlier weights there"
            )
        adapter = trained_adapter(checkpoint, name)
        return merge_lora(weights, adapter.lora, adapter.scale, checkpoint.model)
    net = unet_on_meta(checkpoint.model).state_dict()
    weights = checkpoint.weights(name)
    _check_fit(weights, net, checkpoint.folder)
    return weights


def load_pretrained(path: str | Path, config: UNetConfig) -> dict[str, Tensor]:
    """Read weights from a path as a state dict of the config's net, on the CPU, in the dtype they are stored in.

    path: a .safetensors, .pt or .bin file or an .index.json of shards, under the released names or diffusers'; the
    folder of a diffusers pipeline or UNet, where the copy of the highest precision is read; a run or one of its
    checkpoints, where the moving average is read; such a folder on the hub, ORG/NAME or ORG/NAME@REVISION, of which
    only what is read is fetched.  The names may have a prefix, or lie nested in the file.
    Raises: ValueError if nothing can be read there, or the weights don't fit the net; it names the first of them, or
    says that they are of IF's other stage.
    So it does if the net that is described beside them has other groups, heads or scales, which no shape shows.
    """
    path = _fetched(str(path))
    ours = unet_on_meta(config).state_dict()
    theirs = to_diffusers(ours, config)
    state, numbers = _read(path)
    state, taken_off = take_off_prefix(state, [ours, theirs], path)
    is_diffusers = bool(state.keys() & theirs.keys())
    _check_stage(path, state, config)
    state = _without_idle_variance(state, config)
    _check_fit(state, theirs if is_diffusers else ours, path, taken_off)
    size = numbers.pop("low_res_size", config.low_res_size)
    _check_shapeless(path, numbers, config)
    if size != config.low_res_size:
        logger.warning(
            "%s: its net enlarges images of %d px, this one images of %d px", path, size, config.low_res_size
        )
    if taken_off:
        logger.warning("%s: %s: taken off", path, taken_off)
    return from_diffusers(state, config) if is_diffusers else state


def pinned_weights(location: str, recorded: str = "") -> str:
    """A path that is there as it is, or a name on the hub with its commit; recorded: as in data.storage.hub.pinned.

    Raises: ValueError if there is neither.
    """
    try:
        found = pinned(location, recorded)
    except ValueError as error:
        raise _no_weights(location, error) from None
    if not hub_name(found) and not Path(found).exists():
        raise _no_weights(location)
    return found


def _fetched(location: str) -> Path:
    """The path itself, or the folder in the hub's cache of what it names there, once the weights are in it."""
    found = pinned_weights(location)
    name = hub_name(found)
    if not name:
        return Path(found)
    try:
        return fetch(name, DIFFUSERS_FILES)
    except ValueError as error:
        raise _no_weights(location, error) from None


def _no_weights(location: str, error: ValueError | None = None) -> ValueError:
    """error: why the hub gives none, if the location names something there."""
    of_hub = f", nor of that name in the hub's cache, and {error}" if error else ""
    return ValueError(
        f"no weights at '{Path(location).absolute()}'{of_hub}: name a file or folder on this machine, or ORG/NAME or "
        "ORG/NAME@REVISION on the hub"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights, and what no shape shows of their net if it is described beside them."""
    if path.is_file():
        weights = _read_shards(path) if path.suffix == ".json" else _read_file(path)
        return weights, _read_diffusers_config(path.parent / "config.json")
    for file in DIFFUSERS_FILES:
        if (path / file).is_file():
            return _read(path / file)
    try:
        checkpoint = Checkpoint.open(path)
        weights = net_weights(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"'{path}' holds no diffusion_pytorch_model.*, no unet/ with one, and no checkpoint ({error}): "
            "name such a folder, or the file of the weights itself"
        ) from None
    return weights, {name: getattr(checkpoint.model, name) for name in (*SHAPELESS, "low_res_size")}


def _read_diffusers_config(path: Path) -> dict[str, int]:
    """What no shape shows of the net in a config.json of diffusers; nothing if that is missing or of something else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {
            "norm_groups": saved["norm_num_groups"],
            "num_head_channels": saved["attention_head_dim"],
            "att_pool_heads": saved.get("addition_embed_type_num_heads", 64),  # diffusers' default
            "scale_skip_connection": saved.get("resnet_out_scale_factor", 1) != 1,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
    """The tensors of a file by name, those of nested dicts too; nothing else is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the library that reads it
        raise ValueError(
            f"'{path}' cannot be read as weights ({repr(error)[:200]}): it is damaged, or holds more than tensors; "
            "fetch it again, or save its tensors by name as .safetensors"
        ) from None
    tensors = flatten(state) if isinstance(state, dict) else {}
    if not tensors:
        odd = next(iter(state), "-") if isinstance(state, dict) else "-"
        raise ValueError(
            f"'{path}' is not a dict of names and tensors (first entry that is no tensor: {odd!r}): "
            "save the net's state dict alone"
        )
    return tensors


def _check_stage(path: Path, state: dict[str, Tensor], config: UNetConfig) -> None:
    """Raises: ValueError if the first convolution is that of a net of the other stage."""
    convolution = state.get("input_blocks.0.0.weight", state.get("conv_in.weight"))
    stages = {config.in_channels: "first", 2 * config.in_channels: "second"}
    ours = stages[config.conv_in_channels]
    theirs = stages.get(convolution.shape[1]) if convolution is not None and convolution.ndim > 1 else None
    if theirs and theirs != ours:
        raise ValueError(
            f"the weights in '{path}' are of IF's {theirs} stage, this net is of the {ours} "
            f"(model.low_res_size={config.low_res_size}): name weights of the {ours} stage, or set model to a net of "
            f"the {theirs}"
        )


def _check_shapeless(path: Path, numbers: dict[str, int], config: UNetConfig) -> None:
    for name, theirs in numbers.items():
        if theirs != getattr(config, name):
            raise ValueError(
                f"the weights in '{path}' are of a net with model.{name}={theirs}, this one has "
                f"{getattr(config, name)}: their shapes are equal, their outputs are not: set model.{name}={theirs}"
            )


def _without_idle_variance(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The weights without the output channels, all zero, that train.export adds to a net without a learned variance."""
    parts = [f"{layer}.{kind}" for layer in ("out.2", "conv_out") for kind in ("weight", "bias")]
    outputs = {name: state[name].split(config.in_channels) for name in parts if name in state}
    if config.learn_sigma or not all(len(values) == 2 and not values[1].any() for values in outputs.values()):
        return state
    return state | {name: values[0] for name, values in outputs.items()}


def _check_fit(state: dict[str, Tensor], net: dict[str, Tensor], path: Path, taken_off: str = "") -> None:
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
        without = f", without {taken_off}," if taken_off else ""
        raise ValueError(
            f"the weights in '{path}'{without} don't fit the net: {'; '.join(problems)}: "
            "set model to the net that they are of and embed the captions with its encoder, or name other weights"
        )
