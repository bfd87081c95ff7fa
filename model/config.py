"""The shape of the net, and the checks of its numbers. Imports no torch: a configuration is read in no time."""

from dataclasses import dataclass, field
from typing import Any

# The norm of the text states has this many groups in every net, as diffusers' has.
TEXT_NORM_GROUPS = 32
# With fewer channels in a group, a norm removes most of what their means over the picture say, its colour for one.
MIN_GROUP_CHANNELS = 4
# 'gelu' is the exact one, by erf; the others round its derivative to 1, 2, 3 or 4 bits (model.fewbit).
ACTIVATIONS = ("gelu", "gelu_1bit", "gelu_2bit", "gelu_3bit", "gelu_4bit")
# What backward computes again because forward did not keep it (model.recompute); the gradients are the same with each.
# none: nothing.  cheap: norms, activations and copies; the results of convolutions and projections are kept, and
# attention's q, k and v.  blocks: everything inside the blocks; only their inputs are kept.
RECOMPUTE = ("none", "cheap", "blocks")
# Where the channels of the activations lie in memory: before the pixels or after them. The weights lie as they are.
LAYOUTS = ("nchw", "nhwc")


@dataclass(slots=True)
class UNetConfig:
    """The shape of the net; the defaults are IF-I-XL with the exact GELU.

    image_size: side of the images in pixels; decides which levels the attention_resolutions mean.
    in_channels: channels of the images.
    out_channels: in_channels to predict the noise alone, twice that to predict its variance too.
    model_channels: channels of the finest level.
    channel_mult: channels of each level as multiples of model_channels, the finest level first; each next level has
        half the side.
    num_res_blocks: residual blocks of each level on the way down, or a list of one number a level, the finest first;
        on the way up each level has one more.
    attention_resolutions: sides in pixels of the levels that have attention.
    num_head_channels: channels of a head of attention.
    norm_groups: groups of each norm of the picture's states, 32 as released; at least 4 channels in each are right.
    encoder_dim: width of the text states; 0 for not known yet, and a training takes it from the embeddings' meta.json.
    encoder_channels: width of the text states inside the net, 4 x model_channels as released.
    att_pool_heads: heads of the pooling of the text states; divides encoder_dim.
    activation: gelu, which is exact, or gelu_1bit to gelu_4bit, which keep so few bits of an element for backward.
    low_res_size: side in pixels of the image that a net of the second stage enlarges; 0 for the first stage, which has
        no such image.
    scale_skip_connection: whether the sum that ends a residual block is scaled by 0.7071, as in IF's second stage.
    self_attention: whether attention is over the pixels and the text, or over the text alone.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 704
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    num_res_blocks: Any = 3  # int | list[int], a union that OmegaConf does not have
    attention_resolutions: list[int] = field(default_factory=lambda: [32, 16, 8])
    num_head_channels: int = 64
    norm_groups: int = 32
    encoder_dim: int = 0
    encoder_channels: int = 2816
    att_pool_heads: int = 64
    activation: str = "gelu"
    low_res_size: int = 0
    scale_skip_connection: bool = False
    self_attention: bool = True

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    @property
    def conv_in_channels(self) -> int:
        """Channels that the first convolution takes: those of the image, and of the enlarged one if there is one."""
        return self.in_channels * (2 if self.low_res_size else 1)

    @property
    def res_blocks(self) -> list[int]:
        """Residual blocks of each level on the way down, the finest first."""
        blocks = self.num_res_blocks
        return blocks if isinstance(blocks, list) else [blocks] * len(self.channel_mult)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.model_channels * mult for mult in self.channel_mult]

    @property
    def attention_levels(self) -> list[bool]:
        """Whether each level, the finest first, has attention."""
        return [self.image_size // 2**level in self.attention_resolutions for level in range(len(self.channel_mult))]

    @property
    def group_channels(self) -> int:
        """Channels in the smallest group of a norm."""
        return min(self.widths) // self.norm_groups

    @property
    def time_embed_dim(self) -> int:
        return self.model_channels * max(self.channel_mult)

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "model_channels", "num_head_channels", "norm_groups",
                     "encoder_channels", "att_pool_heads"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(
                f"model.channel_mult={list(self.channel_mult)} must be one or more whole numbers from 1 on"
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"model.out_channels={self.out_channels} with model.in_channels={self.in_channels} must be "
                f"{self.in_channels} for the noise alone or {2 * self.in_channels} with the learned variance"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model.activation={self.activation} must be one of {', '.join(ACTIVATIONS)}")
        if isinstance(self.num_res_blocks, list):  # the command line reads its numbers as texts
            self.num_res_blocks = [int(n) if str(n).isdecimal() else n for n in self.num_res_blocks]
        if not 0 <= self.low_res_size < self.image_size:
            raise ValueError(
                f"model.low_res_size={self.low_res_size} must be smaller than model.image_size={self.image_size}, to "
                "which the net enlarges it, or 0 for a net of the first stage"
            )
        self._check_levels()
        self._check_text()

    def _check_levels(self) -> None:
        levels = len(self.channel_mult)
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"model.image_size={self.image_size} cannot be halved {levels - 1} times for the {levels} levels of "
                f"model.channel_mult: it must be a multiple of {2 ** (levels - 1)}"
            )
        if len(self.res_blocks) != levels or not all(type(n) is int and n > 0 for n in self.res_blocks):
            raise ValueError(
                f"model.num_res_blocks={self.num_res_blocks} must be a whole number from 1 on, or a list of "
                f"{levels}, one for each level of model.channel_mult"
            )
        sizes = [self.image_size // 2**level for level in range(levels)]
        for size in self.attention_resolutions:
            if size not in sizes:
                raise ValueError(f"model.attention_resolutions has {size}, but the levels are {sizes} pixels wide")
        if self.model_channels % 2:
            raise ValueError(f"model.model_channels={self.model_channels} must be even: half cosines and half sines")
        for level, (width, mult) in enumerate(zip(self.widths, self.channel_mult, strict=True)):
            product = f"model.model_channels={self.model_channels} x channel_mult {mult} = {width} channels"
            if width % self.norm_groups:
                raise ValueError(f"{product}, not divisible by the model.norm_groups={self.norm_groups} of the norms")
            if width == self.norm_groups:
                raise ValueError(
                    f"{product} in model.norm_groups={self.norm_groups}: a norm of one channel a group erases the mean "
                    f"of each, and the net cannot see colours: at most {width // MIN_GROUP_CHANNELS} groups are right"
                )
            if (self.attention_levels[level] or level == levels - 1) and width % self.num_head_channels:
                raise ValueError(
                    f"{product}, not divisible into heads of model.num_head_channels={self.num_head_channels}"
                )

    def _check_text(self) -> None:
        if self.encoder_channels % TEXT_NORM_GROUPS:
            raise ValueError(
                f"model.encoder_channels={self.encoder_channels} is not divisible by the {TEXT_NORM_GROUPS} groups of "
                "the text's norm"
            )
        if self.encoder_dim < 0 or self.encoder_dim % self.att_pool_heads:
            raise ValueError(
                f"model.encoder_dim={self.encoder_dim}, the width of the text states, is not divisible by "
                f"model.att_pool_heads={self.att_pool_heads}: change the heads"
            )
