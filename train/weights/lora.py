"""LoRA beside the attention's projections: added to a net, read from a checkpoint or a file, merged into weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.attention import Projection
from model.config import UNetConfig
from model.convert import lora_to_diffusers, merge_lora
from model.super_resolution import make_net
from model.unet import UNet
from train.checkpoint.checkpoint import Checkpoint
from train.config import LoRAConfig

TARGETS = ["qkv", "encoder_kv", "proj_out"]
# diffusers' name for the file of a LoRA.
FILE = "pytorch_lora_weights.safetensors"
# What peft puts into the names of the matrices.
PEFT_NAME = ".default."


@dataclass(slots=True)
class Adapter:
    """LoRA matrices under diffusers' names; they add scale x B A to a weight."""

    lora: dict[str, Tensor]
    scale: float


def add_lora(
    unet: UNet, config: LoRAConfig, weights: Mapping[str, Tensor] | None = None, on_meta: bool = False
) -> None:
    """Freeze the net and add LoRA matrices beside every projection of its attention; at first they change nothing.

    weights: of the net, needed on rank 0 alone; the engine sends them to the others.  on_meta: the matrices are added
    without memory for them.
    Source: Hu et al. 2021.
    """
    # Imported here: peft takes seconds to import, and every start imports this file.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    if weights:
        unet.load_state_dict(weights)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS)
    # peft takes a Projection for a convolution, because of its class; it is a linear map.
    lora._register_custom_module({Projection: Linear})
    unet.requires_grad_(False)
    inject_adapter_in_model(lora, unet, low_cpu_mem_usage=on_meta)


def unet_on_meta(config: UNetConfig, lora: LoRAConfig | None = None, recompute: str = "none") -> UNet:
    """A net that takes no memory, of any size, with LoRA if its rank is above 0.

    recompute: one of model.config.RECOMPUTE.
    """
    with torch.device("meta"):
        unet = make_net(config, recompute)
        if lora and lora.rank:
            add_lora(unet, lora, on_meta=True)
    return unet


def trained_adapter(checkpoint: Checkpoint, name: str) -> Adapter:
    """The LoRA that a run with LoRA trained.  name: 'ema' or 'master'.

    Raises: ValueError if the run trained a whole net, or the checkpoint's files are not intact.
    """
    lora = checkpoint.config["lora"]
    if not lora["rank"]:
        raise ValueError(
            f"'{checkpoint.folder}' is of a whole net, not of a LoRA: export it with `python -m train.export`"
        )
    weights = {key.replace(PEFT_NAME, "."): value for key, value in checkpoint.weights(name).items()}
    return Adapter(lora_to_diffusers(weights, checkpoint.model), lora["alpha"] / lora["rank"])


def save_adapter(folder: Path, checkpoint: Checkpoint, name: str) -> None:
    """Write a run's LoRA into a folder, as load_lora_weights of IFPipeline and IFSuperResolutionPipeline reads it.

    Raises: ValueError, as trained_adapter.
    """
    from diffusers import IFPipeline  # as peft above

    lora, adapter = checkpoint.config["lora"], trained_adapter(checkpoint, name)
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in adapter.lora})
    IFPipeline.save_lora_weights(
        folder, adapter.lora,
        unet_lora_adapter_metadata={"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": modules},
    )  # fmt: skip


def read_adapter(path: str | Path) -> Adapter:
    """A LoRA of an IF stage as diffusers saves it, from the file or its folder.

    Raises: ValueError if there is none.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"no adapter can be read at '{path.absolute()}' ({error}): name a {FILE} or its folder"
        ) from None
    lora = {key.removeprefix("unet."): value for key, value in state.items() if ".lora_" in key}
    if not lora:
        raise ValueError(f"'{file}' holds no LoRA matrices: name a {FILE}")
    rank = next(value.shape[0] for key, value in lora.items() if ".lora_A." in key)
    return Adapter(lora, float(metadata.get("unet.lora_alpha", rank)) / rank)


def merge_adapter(unet: UNet, path: str | Path) -> None:
    """Merge a LoRA's file into the net's weights.

    Raises: ValueError if there is no such file, or it is of another net.
    """
    adapter = read_adapter(path)
    unet.load_state_dict(merge_lora(unet.state_dict(), adapter.lora, adapter.scale, unet.config))
