"""The names of the weights: those of original IF, which model.unet uses, <-> diffusers' UNet2DConditionModel."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.blocks import SKIP_SCALE
from model.config import UNetConfig

RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {
    "norm": ["group_norm"],
    "norm_encoder": ["norm_cross"],
    "qkv": ["to_q", "to_k", "to_v"],
    "encoder_kv": ["add_k_proj", "add_v_proj"],
    "proj_out": ["to_out.0"],
}
OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "encoder_proj": "encoder_hid_proj",
    "encoder_pooling.0": "add_embedding.norm1",
    "encoder_pooling.1.q_proj": "add_embedding.pool.q_proj",
    "encoder_pooling.1.k_proj": "add_embedding.pool.k_proj",
    "encoder_pooling.1.v_proj": "add_embedding.pool.v_proj",
    "encoder_pooling.2": "add_embedding.proj",
    "encoder_pooling.3": "add_embedding.norm2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
AUGMENTATION = {"aug_proj.0": "class_embedding.linear_1", "aug_proj.2": "class_embedding.linear_2"}
POSITION = ("encoder_pooling.1.positional_embedding", "add_embedding.pool.positional_embedding")


def diffusers_config(config: UNetConfig) -> dict[str, object]:
    """The arguments that make diffusers.UNet2DConditionModel the net of the config.

    Raises: ValueError for a first channel_mult other than 1, which diffusers cannot express.
    """
    if config.channel_mult[0] != 1:
        raise ValueError(f"channel_mult={list(config.channel_mult)}: diffusers' UNet must begin with 1")
    levels = config.attention_levels
    down = ["SimpleCrossAttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in levels]
    up = ["SimpleCrossAttnUpBlock2D" if attends else "ResnetUpsampleBlock2D" for attends in reversed(levels)]
    arguments: dict[str, object] = {
        "sample_size": config.image_size,
        "in_channels": config.conv_in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": up,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "act_fn": "gelu",
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "attention_head_dim": config.num_head_channels,
        "cross_attention_dim": config.encoder_channels,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": None if config.encoder_dim == config.encoder_channels else config.encoder_dim,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": config.att_pool_heads,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": config.time_embed_dim,
        "only_cross_attention": not config.self_attention,
    }
    if config.scale_skip_connection:
        arguments |= {"resnet_out_scale_factor": 1 / SKIP_SCALE, "mid_block_scale_factor": 1 / SKIP_SCALE}
    if config.low_res_size:
        # The embedding is activated once and not in every block, as in the released net; the numbers are the same.
        arguments |= {"class_embed_type": "timestep", "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True}
    return arguments


def to_diffusers(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The weights under diffusers' names: q, k, v apart and as matrices instead of 1x1 convolutions.

    Raises: ValueError that names the first weights that are missing or too many.
    """
    return {name: part for _, parts in each_to_diffusers(state_dict, config) for name, part in parts.items()}


def each_to_diffusers(
    state_dict: Mapping[str, Tensor], config: UNetConfig
) -> Iterator[tuple[str, dict[str, Tensor]]]:  # fmt: skip
    """As to_diffusers, parameter by parameter: our name, and the weights under diffusers' names that replace it.

    The caller may delete a parameter once it was yielded.
    Raises: ValueError, as to_diffusers.
    """
    pairs = list(_pairs(config))
    _check_names(state_dict, [ours for ours, _ in pairs])
    for ours, theirs in pairs:
        value = state_dict[ours]
        if _is_projection(ours) and value.ndim == 3:
            value = value.squeeze(-1)
        yield ours, dict(zip(theirs, _split_heads(value, len(theirs), config.num_head_channels), strict=True))


def from_diffusers(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The weights under the names of model.unet, from those under diffusers'; the inverse of to_diffusers.

    Raises: ValueError that names the first weights that are missing or too many.
    """
    pairs = list(_pairs(config))
    _check_names(state_dict, [name for _, theirs in pairs for name in theirs])
    result = {}
    for ours, theirs in pairs:
        value = _join_heads([state_dict[name] for name in theirs], config.num_head_channels)
        if _is_projection(ours) and ours.endswith("weight"):
            value = value.unsqueeze(-1)
        result[ours] = value
    return result


def lora_to_diffusers(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The LoRA matrices of fused projections (NAME.lora_A.weight, NAME.lora_B.weight) under diffusers' names.

    q, k and v share their A; the rows of B are the projection's, so B is split as the projection is.
    Raises: ValueError that names the first matrices that are missing or too many.
    """
    pairs = [pair for pair in _modules(config) if _is_projection(f"{pair[0]}.weight")]
    _check_names(state_dict, [f"{ours}.lora_{part}.weight" for ours, _ in pairs for part in "AB"])
    result = {}
    for ours, theirs in pairs:
        parts = _split_heads(state_dict[f"{ours}.lora_B.weight"], len(theirs), config.num_head_channels)
        for name, b in zip(theirs, parts, strict=True):
            # Each is a copy, because safetensors refuses tensors that share memory.
            result[f"{name}.lora_A.weight"] = state_dict[f"{ours}.lora_A.weight"].clone()
            result[f"{name}.lora_B.weight"] = b.clone()
    return result


def merge_lora(
    state_dict: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float, config: UNetConfig
) -> dict[str, Tensor]:
    """The weights with scale x B A added to each matrix that a LoRA, under diffusers' names, changes.

    Raises: ValueError if the LoRA is of another net.
    """
    weights = to_diffusers(state_dict, config)
    for name in sorted({key.rsplit(".lora_", 1)[0] for key in lora}):
        a, b = lora.get(f"{name}.lora_A.weight"), lora.get(f"{name}.lora_B.weight")
        weight = weights.get(f"{name}.weight")
        if a is None or b is None or weight is None or weight.shape != (b.shape[0], a.shape[1]):
            there = "none" if weight is None else list(weight.shape)
            given = "A or B alone" if a is None or b is None else [b.shape[0], a.shape[1]]
            raise ValueError(
                f"the adapter is of another net: it changes '{name}' of {given}, and here that is {there}: "
                "name the net that it was trained on"
            )
        weights[f"{name}.weight"] = weight + scale * (b.to(weight) @ a.to(weight))
    return from_diffusers(weights, config)


def _pairs(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    """Each of our weights with its diffusers names, several where diffusers keeps q, k and v apart."""
    yield POSITION[0], [POSITION[1]]
    for ours, theirs in _modules(config):
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs]


def _modules(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    for ours, theirs in (OUTSIDE_BLOCKS | (AUGMENTATION if config.low_res_size else {})).items():
        if ours != "encoder_proj" or config.encoder_dim != config.encoder_channels:
            yield ours, [theirs]

    parts = ATTENTION if config.self_attention else ATTENTION | {"qkv": ["to_q"]}
    widths, last = config.widths, len(config.widths) - 1
    block, channels = 1, widths[0]
    for level, width in enumerate(widths):
        for i in range(config.res_blocks[level]):
            name, theirs = f"input_blocks.{block}", f"down_blocks.{level}"
            yield from _res_block(f"{name}.0", f"{theirs}.resnets.{i}", shortcut=channels != width)
            if config.attention_levels[level]:
                yield from _attention(f"{name}.1", f"{theirs}.attentions.{i}", parts)
            block, channels = block + 1, width
        if level < last:
            yield from _res_block(f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", shortcut=False)
            block += 1

    yield from _res_block("middle_block.0", "mid_block.resnets.0", shortcut=False)
    yield from _attention("middle_block.1", "mid_block.attentions.0", parts)
    yield from _res_block("middle_block.2", "mid_block.resnets.1", shortcut=False)

    block = 0
    for level in range(last, -1, -1):
        for i in range(config.res_blocks[level] + 1):
            name, theirs = f"output_blocks.{block}", f"up_blocks.{last - level}"
            yield from _res_block(f"{name}.0", f"{theirs}.resnets.{i}", shortcut=True)
            if config.attention_levels[level]:
                yield from _attention(f"{name}.1", f"{theirs}.attentions.{i}", parts)
            if level and i == config.res_blocks[level]:
                index = 2 if config.attention_levels[level] else 1
                yield from _res_block(f"{name}.{index}", f"{theirs}.upsamplers.0", shortcut=False)
            block += 1


def _res_block(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, list[str]]]:
    for our_part, their_part in RES_BLOCK.items():
        if shortcut or our_part != "skip_connection":
            yield f"{ours}.{our_part}", [f"{theirs}.{their_part}"]


def _attention(ours: str, theirs: str, parts: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    for our_part, their_parts in parts.items():
        yield f"{ours}.{our_part}", [f"{theirs}.{part}" for part in their_parts]


def _is_projection(name: str) -> bool:
    """Whether a weight is of one of the attention's 1x1 convolutions, which are matrices in diffusers."""
    return name.split(".")[-2] in ("qkv", "encoder_kv", "proj_out")


def _split_heads(value: Tensor, parts: int, head_channels: int) -> list[Tensor]:
    """Rows grouped by head, q k v in each -> all of q, all of k, all of v."""
    if parts == 1:
        return [value]
    heads = value.unflatten(0, (-1, parts, head_channels))
    return [part.flatten(0, 1).contiguous() for part in heads.unbind(1)]


def _join_heads(values: list[Tensor], head_channels: int) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack([value.unflatten(0, (-1, head_channels)) for value in values], dim=1).flatten(0, 2)


def _check_names(state_dict: Mapping[str, Tensor], names: list[str]) -> None:
    missing = sorted(set(names) - set(state_dict))
    unknown = sorted(set(state_dict) - set(names))
    if missing or unknown:
        raise ValueError(
            f"the weights don't fit the config: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
