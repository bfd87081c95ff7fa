"""The IF stage I UNet: predicts the noise in small images, and its variance, from a timestep and T5 states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.activations import make_activation
from model.attention import AttentionBlock
from model.blocks import ResBlock, group_norm, zero_init
from model.config import LAYOUTS, RECOMPUTE, UNetConfig
from model.embeddings import AttentionPooling, timestep_embedding
from model.recompute import call, recomputed


class TextState(NamedTuple):
    """What the net makes of a caption, the same for every timestep.

    states: [N, encoder_channels, L]; pooled: [N, time_embed_dim].
    """

    states: Tensor
    pooled: Tensor


class Stage(nn.ModuleList):
    """Layers that run one after another, each given what its kind needs; the first also takes the skip, if any."""

    def __init__(self, layers: list[nn.Module], recompute: str) -> None:
        super().__init__(layers)
        self.run = recomputed if recompute == "blocks" else call

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
    recompute: one of model.config.RECOMPUTE, what backward computes again to save memory; no gradient depends on it.
    layout: one of model.config.LAYOUTS, where the channels of the activations lie in memory.
    Returns [N, out_channels, H, W] in the parameters' dtype: noise, then where the variance lies between its bounds.
    Raises: ValueError for an input whose numbers don't fit the config, or a config whose encoder_dim is not known.
    Source: DeepFloyd IF's UNetModel, from guided-diffusion.
    """

    # What compile_stages compiles besides the stages.
    outside_stages: tuple[str, ...] = ("_encode_text", "_embed", "_predict")

    def __init__(self, config: UNetConfig, recompute: str = "none", layout: str = "nchw") -> None:
        super().__init__()
        if not config.encoder_dim:
            raise ValueError("model.encoder_dim=0: give the width of the text states, 4096 for T5-XXL")
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute} must be one of {', '.join(RECOMPUTE)}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout} must be one of {', '.join(LAYOUTS)}")
        # Every layer gives its result in the layout of its input, so that of the images decides.
        self.memory_format = torch.channels_last if layout == "nhwc" else torch.preserve_format
        self.config = config
        emb, act, widths, groups = config.time_embed_dim, config.activation, config.widths, config.norm_groups
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
            heads, text = config.num_head_channels, config.encoder_channels
            return AttentionBlock(channels, heads, text, groups, recompute, config.self_attention)

        def res(in_channels: int, out_channels: int, resample: str = "none") -> ResBlock:
            scale = config.scale_skip_connection
            return ResBlock(in_channels, out_channels, emb, groups, act, resample, recompute, scale)

        def stage(*layers: nn.Module) -> Stage:
            return Stage(list(layers), recompute)

        ch = widths[0]
        self.input_blocks = nn.ModuleList([stage(nn.Conv2d(config.conv_in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(config.res_blocks[level]):
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
            for i in range(config.res_blocks[level] + 1):
                block = stage(res(ch + skips.pop(), widths[level]))
                ch = widths[level]
                if config.attention_levels[level]:
                    block.append(attention(ch))
                if level and i == config.res_blocks[level]:
                    block.append(res(ch, ch, "up"))
                self.output_blocks.append(block)

        self.run = call if recompute == "none" else recomputed
        self.out = nn.Sequential(
            group_norm(groups, ch),
            make_activation(act, recompute),
            zero_init(nn.Conv2d(ch, config.out_channels, 3, padding=1)),
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode_text(self, text_emb: Tensor) -> TextState:
        """The part of the forward that only the caption decides: a sampler computes it once for all its steps.

        text_emb: [N, L, encoder_dim].
        Raises: ValueError for another shape.
        """
        if text_emb.ndim != 3 or text_emb.shape[2] != self.config.encoder_dim:
            raise ValueError(
                f"text_emb is {list(text_emb.shape)}, the net takes [N, L, {self.config.encoder_dim}]: "
                "embed the captions with the net's encoder, or set model.encoder_dim"
            )
        return TextState(*self._encode_text(text_emb))

    def forward(self, x: Tensor, timesteps: Tensor, text_emb: Tensor | TextState) -> Tensor:
        text = text_emb if isinstance(text_emb, TextState) else self.encode_text(text_emb)
        self._check_input(x, timesteps, text)
        return self._denoise(x, timesteps, text)

    def _denoise(self, x: Tensor, timesteps: Tensor, text: TextState) -> Tensor:
        """The forward of what was checked; x: [N, conv_in_channels, H, W]."""
        emb = self._embed(timesteps, text.pooled)
        h = x.to(self.dtype, memory_format=self.memory_format)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, text.states)
            skips.append(h)
        h = self.middle_block(h, emb, text.states)
        for block in self.output_blocks:
            h = block(h, emb, text.states, skips.pop())
        return self._predict(h)

    def compile_stages(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile compile each Stage by itself, and what comes before and after them; equal Stages once.

        Not the forward as a whole: its backward would be one function, and no gradient would be there before its end,
        so that none could be all-reduced meanwhile.
        """
        import torch._dynamo.config as dynamo  # not at the top: it takes seconds, and sampling needs none of it

        # Each kind of Stage is a compilation of the same code; at torch's limit of 8 it would raise.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 128)

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

        for stage in (*self.input_blocks, self.middle_block, *self.output_blocks):
            stage.forward = compiled(stage.forward)
        for name in self.outside_stages:
            setattr(self, name, compiled(getattr(self, name)))

    def _encode_text(self, text_emb: Tensor) -> tuple[Tensor, Tensor]:
        text_emb = text_emb.to(self.dtype)
        return self.encoder_proj(text_emb).transpose(1, 2).contiguous(), self.encoder_pooling(text_emb)

    def _embed(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        return self.emb_activation(emb + pooled)

    def _predict(self, h: Tensor) -> Tensor:
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
            raise ValueError(f"timesteps are {timesteps.dtype}, too coarse to tell 1000 steps apart: give integers")
