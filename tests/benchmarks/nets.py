"""The nets that the benchmarks compare, of one size and with the same weights: the original's, diffusers' and ours."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from model.config import UNetConfig
from model.convert import diffusers_config, to_diffusers
from model.unet import UNet

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {"M": "if_i_m", "L": "if_i_l", "XL": "if_i_xl"}
FEW_BIT = "gelu_3bit"
OURS = {
    "ours, exact GELU": ("gelu", "none"),
    "ours, few-bit GELU": (FEW_BIT, "none"),
    "ours, few-bit, cheap recomputation": (FEW_BIT, "cheap"),
    "ours, few-bit, block recomputation": (FEW_BIT, "blocks"),
}
ORIGINAL, DIFFUSERS = "original (einsum attention)", "diffusers"


def size(name: str) -> UNetConfig:
    """The config of '34M', 'M', 'L' or 'XL', with the exact GELU; the published sizes on T5-XXL's states.

    Raises: ValueError for another name.
    """
    small = {"model_channels": 64, "encoder_channels": 256, "att_pool_heads": 8}
    if name not in ("34M", *PUBLISHED):
        raise ValueError(f"size '{name}' is not known; there are 34M, {', '.join(PUBLISHED)}")
    values = small if name == "34M" else OmegaConf.load(ROOT / f"conf/model/{PUBLISHED[name]}.yaml")
    config: UNetConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(UNetConfig), values))  # type: ignore[assignment]
    return replace(config, activation="gelu", encoder_dim=64 if name == "34M" else 4096)


def build(name: str, config: UNetConfig, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """A net that is called as net(x, t, text_emb) and returns [N, out_channels, H, W].

    name: ORIGINAL, DIFFUSERS or a key of OURS.  weights: in the released layout; fresh ones without.
    """
    net: nn.Module
    if name == ORIGINAL:
        net, found = _original(config), weights
    elif name == DIFFUSERS:
        net = _Diffusers(config)
        found = weights and {f"net.{key}": value for key, value in to_diffusers(weights, config).items()}
    else:
        activation, recompute = OURS[name]
        net, found = UNet(replace(config, activation=activation), recompute), weights
    if found:
        net.load_state_dict(found, strict=True)
    return net


def inputs(config: UNetConfig, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random x, t and text_emb of 77 tokens."""
    x = torch.randn(batch, config.in_channels, config.image_size, config.image_size, device=device)
    t = torch.randint(1000, (batch,), device=device)
    return x, t, torch.randn(batch, 77, config.encoder_dim, device=device)


class _Diffusers(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.net = UNet2DConditionModel(**diffusers_config(config))

    def forward(self, x: Tensor, t: Tensor, text_emb: Tensor) -> Tensor:
        return self.net(x, t, text_emb, return_dict=False)[0]


def _original(config: UNetConfig) -> nn.Module:
    """The net as DeepFloyd published it; its forward takes x, t and text_emb too."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a switch of its own
            from deepfloyd_if.model.unet import UNetModel
    except ImportError:
        raise SystemExit("the original net is not installed: `make bench` installs it and runs this") from None
    return UNetModel(
        in_channels=config.in_channels,
        model_channels=config.model_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=",".join(map(str, config.attention_resolutions)),
        activation="gelu",
        encoder_dim=config.encoder_dim,
        att_pool_heads=config.att_pool_heads,
        encoder_channels=config.encoder_channels,
        image_size=config.image_size,
        channel_mult=tuple(config.channel_mult),
        num_head_channels=config.num_head_channels,
        use_scale_shift_norm=True,
        resblock_updown=True,
        precision={torch.float32: "32", torch.bfloat16: "bf16"}[torch.get_default_dtype()],
    )
