"""LoRA beside the attention's projections: added to a net, read from a file, merged into weights."""

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
from model.unet import UNet
from train.checkpoint.reader import load_weights
from train.config import LoRAConfig

TARGETS = ["qkv", "encoder_kv", "proj_out"]


FILE = "pytorch_lora_weights.safetensors"


PEFT_NAME = ".default."


@dataclass(slots=True)
class Adapter:
    """LoRA matrices in diffusers' names; what they learned is B A x scale."""

    lora: dict[str, Tensor]
    scale: float


def add_lora(
    unet: UNet, config: LoRAConfig, weights: Mapping[str, Tensor] | None = None, on_meta: bool = False
) -> None:
    """Freeze the net and add LoRA matrices, which change nothing yet, beside every projection of its attention.

    weights: of the net, needed on rank 0 alone; the engine gives them to the others.  on_meta: without memory for what
    is added.
    Source: Hu et al. 2021.
    """
    # Here, for they take seconds to import, and every start imports this file.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    if weights:
        unet.load_state_dict(weights)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS)
    # By its class peft takes a Projection for a convolution; what it does is linear.
    lora._register_custom_module({Projection: Linear})
    unet.requires_grad_(False)
    inject_adapter_in_model(lora, unet, low_cpu_mem_usage=on_meta)


def unet_on_meta(config: UNetConfig, lora: LoRAConfig | None = None, recompute: str = "none") -> UNet:
    """A net that takes no memory, of any size, with LoRA if its rank is above 0.

    recompute: one of model.config.RECOMPUTE.
    """
    with torch.device("meta"):
        unet = UNet(config, recompute)
        if lora and lora.rank:
            add_lora(unet, lora, on_meta=True)
    return unet


def trained_adapter(folder: Path, name: str, run: dict, model: UNetConfig) -> Adapter:
    """What a checkpoint of a run with LoRA holds.  name: 'ema' or 'master'; run: its configuration.

    Raises: ValueError if it isn't whole, or not of this net.
    """
    weights = {key.replace(PEFT_NAME, "."): value for key, value in load_weights(folder, name).items()}
    return Adapter(lora_to_diffusers(weights, model), run["lora"]["alpha"] / run["lora"]["rank"])


def read_adapter(path: str | Path) -> Adapter:
    """A LoRA of IF's first stage as diffusers saves it: the file, or its folder.

    Raises: ValueError if there is none.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"no adapter can be read at '{path}' ({error}): name a {FILE} or its folder") from None
    lora = {key.removeprefix("unet."): value for key, value in state.items() if ".lora_" in key}
    if not lora:
        raise ValueError(f"'{file}' holds no LoRA matrices: name a {FILE}")
    rank = next(value.shape[0] for key, value in lora.items() if ".lora_A." in key)
    return Adapter(lora, float(told.get("unet.lora_alpha", rank)) / rank)


def merge_adapter(unet: UNet, path: str | Path) -> None:
    """Add what a LoRA file learned to the net's weights.

    Raises: ValueError if there is none, or it is of another net.
    """
    adapter = read_adapter(path)
    unet.load_state_dict(merge_lora(unet.state_dict(), adapter.lora, adapter.scale, unet.config))
