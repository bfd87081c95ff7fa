"""The IF stage I UNet: predicts the noise in small images, and its variance, from a timestep and T5 states."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.activations import ACTIVATIONS, make_activation
from model.attention import AttentionBlock
from model.blocks import NORM_GROUPS, ResBlock, group_norm, zero_init
from model.embeddings import AttentionPooling, timestep_embedding
from model.recompute import MEMORY, call, recompute


@dataclass(slots=True)
class UNetConfig:
    """The shape of the net; the defaults are IF-I-XL with the exact GELU.

    image_size: pixels, only to tell which levels the attention_resolutions (pixels too) mean.
    out_channels: in_channels for the noise alone, twice that with the learned variance.
    encoder_dim: width of the text states; encoder_channels: their width inside, 4 x model_channels as released.
    memory: what is kept for backward, see model.recompute; the same gradients with each.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 704
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    num_res_blocks: int = 3
    attention_resolutions: list[int] = field(default_factory=lambda: [32, 16, 8])
    num_head_channels: int = 64
    encoder_dim: int = 4096
    encoder_channels: int = 2816
    att_pool_heads: int = 64
    activation: str = "gelu"
    memory: str = "keep"

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.model_channels * mult for mult in self.channel_mult]

    @property
    def attention_levels(self) -> list[bool]:
        """Whether each level, the finest first, has attention."""
        return [self.image_size // 2**level in self.attention_resolutions for level in range(len(self.channel_mult))]

    @property
    def time_embed_dim(self) -> int:
        return self.model_channels * max(self.channel_mult)


class TextState(NamedTuple):
    """What the net makes of a caption, whatever the timestep.

    states: [N, encoder_channels, L]; pooled: [N, time_embed_dim].
    """

    states: Tensor
    pooled: Tensor


class Stage(nn.ModuleList):
    """Layers that run one after another, each given what its kind needs; the first also takes the skip, if any."""

    def __init__(self, layers: list[nn.Module], memory: str) -> None:
        super().__init__(layers)
        self.run = recompute if memory == "recompute_blocks" else call

    def forward(self, h: Tensor, emb: Tensor, states: Tensor, *skip: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = self.run(layer, h, emb, *skip)
            elif isinstance(layer, AttentionBlock):
                h = self.run(layer, h, states)
            else:
                h = layer(h)
            skip = ()
        return h


class UNet(nn.Module):
    """The net of the config, its parameters named as in the released weights.

    x: [N, in_channels, H, W] in [-1, 1]; timesteps: [N]; text_emb: [N, L, encoder_dim], or what encode_text made of it.
    Returns [N, out_channels, H, W] in the parameters' dtype: the noise, then the variance's place between its bounds.
    Raises: ValueError for a config or an input whose numbers don't fit together.
    Source: DeepFloyd IF's UNetModel, from guided-diffusion.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        emb, act, memory, widths = config.time_embed_dim, config.activation, config.memory, config.widths
        last = len(widths) - 1

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb), make_activation(act), nn.Linear(emb, emb)
        )
        self.emb_activation = make_activation(act)
        same = config.encoder_dim == config.encoder_channels
        self.encoder_proj = nn.Identity() if same else nn.Linear(config.encoder_dim, config.encoder_channels)
        self.encoder_pooling = nn.Sequential(
            nn.LayerNorm(config.encoder_dim),
            AttentionPooling(config.att_pool_heads, config.encoder_dim),
            nn.Linear(config.encoder_dim, emb),
            nn.LayerNorm(emb),
        )

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, config.num_head_channels, config.encoder_channels, memory)

        def res(in_channels: int, out_channels: int, resample: str = "none") -> ResBlock:
            return ResBlock(in_channels, out_channels, emb, act, resample, memory)

        def stage(*layers: nn.Module) -> Stage:
            return Stage(list(layers), memory)

        ch = widths[0]
        self.input_blocks = nn.ModuleList([stage(nn.Conv2d(config.in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                block = stage(res(ch, width))
                if config.attention_levels[level]:
                    block.append(attention(width))
                self.input_blocks.append(block)
                skips.append(ch := width)
            if level < last:
                self.input_blocks.append(stage(res(ch, ch, "down")))
                skips.append(ch)

        self.middle_block = stage(res(ch, ch), attention(ch), res(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for i in range(config.num_res_blocks + 1):
                block = stage(res(ch + skips.pop(), widths[level]))
                ch = widths[level]
                if config.attention_levels[level]:
                    block.append(attention(ch))
                if level and i == config.num_res_blocks:
                    block.append(res(ch, ch, "up"))
                self.output_blocks.append(block)

        self.run = call if memory == "keep" else recompute
        self.out = nn.Sequential(
            group_norm(ch), make_activation(act, memory), zero_init(nn.Conv2d(ch, config.out_channels, 3, padding=1))
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode_text(self, text_emb: Tensor) -> TextState:
        """What every step of a sampler needs of a caption, so that it can be computed once.

        text_emb: [N, L, encoder_dim].
        """
        if text_emb.ndim != 3 or text_emb.shape[2] != self.config.encoder_dim:
            raise ValueError(
                f"text_emb is {list(text_emb.shape)}, the net takes [N, L, {self.config.encoder_dim}]: "
                "embed the captions with the encoder of the config, or set encoder_dim"
            )
        text_emb = text_emb.to(self.dtype)
        states = self.encoder_proj(text_emb).transpose(1, 2).contiguous()
        return TextState(states, self.encoder_pooling(text_emb))

    def forward(self, x: Tensor, timesteps: Tensor, text_emb: Tensor | TextState) -> Tensor:
        text = text_emb if isinstance(text_emb, TextState) else self.encode_text(text_emb)
        self._check_input(x, timesteps, text)
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        emb = self.emb_activation(emb + text.pooled)

        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, text.states)
            skips.append(h)
        h = self.middle_block(h, emb, text.states)
        for block in self.output_blocks:
            h = block(h, emb, text.states, skips.pop())
        return self.run(self.out, h)

    def _check_input(self, x: Tensor, timesteps: Tensor, text: TextState) -> None:
        multiple = 2 ** (len(self.config.channel_mult) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x is {list(x.shape)}, the net takes [N, {self.config.in_channels}, H, W]")
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"x is {x.shape[2]} x {x.shape[3]} pixels, the {len(self.config.channel_mult)} levels of the net "
                f"halve them to the last: both must be multiples of {multiple}"
            )
        if timesteps.shape != x.shape[:1] or text.states.shape[0] != x.shape[0]:
            raise ValueError(
                f"x has {x.shape[0]} images, timesteps are {list(timesteps.shape)} and the text has "
                f"{text.states.shape[0]} captions: give one timestep and one caption for each image"
            )
        if timesteps.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"timesteps are {timesteps.dtype}, which cannot tell all of 1000 apart: give integers")


def check(config: UNetConfig) -> None:
    """Refuse a config whose numbers don't fit together.

    Raises: ValueError that names them.
    """
    for name in ("image_size", "in_channels", "model_channels", "num_res_blocks", "num_head_channels", "encoder_dim",
                 "encoder_channels", "att_pool_heads"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1")
    if not config.channel_mult or min(config.channel_mult) < 1:
        raise ValueError(f"channel_mult={list(config.channel_mult)}: must be one or more whole numbers from 1 on")
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"out_channels={config.out_channels} with in_channels={config.in_channels}: must be "
            f"{config.in_channels} for the noise alone or {2 * config.in_channels} with the learned variance"
        )
    levels = len(config.channel_mult)
    if config.image_size % 2 ** (levels - 1):
        raise ValueError(
            f"image_size={config.image_size} cannot be halved {levels - 1} times for the {levels} levels of "
            f"channel_mult: must be a multiple of {2 ** (levels - 1)}"
        )
    sizes = [config.image_size // 2**level for level in range(levels)]
    for size in config.attention_resolutions:
        if size not in sizes:
            raise ValueError(f"attention_resolutions has {size}, but the levels are {sizes} pixels wide")
    if config.model_channels % 2:
        raise ValueError(f"model_channels={config.model_channels}: must be even, half cosines and half sines")
    for level, (width, mult) in enumerate(zip(config.widths, config.channel_mult, strict=True)):
        what = f"model_channels={config.model_channels} x channel_mult {mult} = {width} channels"
        if width % NORM_GROUPS:
            raise ValueError(f"{what}, not divisible by the {NORM_GROUPS} groups of the norms")
        if (config.attention_levels[level] or level == levels - 1) and width % config.num_head_channels:
            raise ValueError(f"{what}, not divisible into heads of num_head_channels={config.num_head_channels}")
    if config.encoder_channels % NORM_GROUPS:
        raise ValueError(
            f"encoder_channels={config.encoder_channels}, not divisible by the {NORM_GROUPS} groups of the norms"
        )
    if config.encoder_dim % config.att_pool_heads:
        raise ValueError(f"encoder_dim={config.encoder_dim}, not divisible by att_pool_heads={config.att_pool_heads}")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation='{config.activation}': known are {', '.join(ACTIVATIONS)}")
    if config.memory not in MEMORY:
        raise ValueError(f"memory='{config.memory}': known are {', '.join(MEMORY)}")
