import dataclasses

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._dynamo.utils import counters

from data.config import DataConfig
from model.attention import AttentionBlock
from model.blocks import group_norm
from model.config import UNetConfig
from model.embeddings import AttentionPooling, timestep_embedding
from model.unet import UNet
from train.config import Config
from train.inputs import find_inputs

RELEASED = {
    "M": ({"model_channels": 192, "encoder_channels": 768}, 371_605_830),
    "L": ({"model_channels": 320, "encoder_channels": 1280}, 935_365_830),
    "XL": ({}, 4_304_695_110),
}
TINY = {
    "image_size": 16,
    "model_channels": 32,
    "norm_groups": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "num_head_channels": 16,
    "encoder_dim": 24,
    "encoder_channels": 64,
    "att_pool_heads": 4,
}


def tiny(**changes: object) -> UNetConfig:
    return UNetConfig(**{**TINY, **changes})


def randomised(config: UNetConfig, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(n: int = 2, size: int = 16, tokens: int = 5, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 3, size, size, generator=generator),
        torch.arange(n) * 437 + 3,
        torch.randn(n, tokens, width, generator=generator),
    )


@pytest.mark.parametrize("size", RELEASED)
def test_parameter_count_of_the_released_sizes(size):
    changes, count = RELEASED[size]
    with torch.device("meta"):
        unet = UNet(UNetConfig(encoder_dim=4096, **changes))
    assert sum(p.numel() for p in unet.parameters()) == count


def test_state_dict_has_the_released_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in UNet(UNetConfig(encoder_dim=4096)).state_dict().items()}
    expected = {
        "time_embed.0.weight": (2816, 704),
        "time_embed.2.bias": (2816,),
        "encoder_proj.weight": (2816, 4096),
        "encoder_pooling.0.weight": (4096,),
        "encoder_pooling.1.positional_embedding": (1, 4096),
        "encoder_pooling.1.k_proj.weight": (4096, 4096),
        "encoder_pooling.1.q_proj.bias": (4096,),
        "encoder_pooling.1.v_proj.weight": (4096, 4096),
        "encoder_pooling.2.weight": (2816, 4096),
        "encoder_pooling.3.bias": (2816,),
        "input_blocks.0.0.weight": (704, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (704,),
        "input_blocks.1.0.in_layers.2.weight": (704, 704, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (1408, 2816),
        "input_blocks.1.0.out_layers.0.bias": (704,),
        "input_blocks.1.0.out_layers.3.weight": (704, 704, 3, 3),
        "input_blocks.4.0.in_layers.2.weight": (704, 704, 3, 3),  # the halving block of the first level
        "input_blocks.5.0.skip_connection.weight": (1408, 704, 1, 1),
        "input_blocks.5.1.norm.weight": (1408,),
        "input_blocks.5.1.qkv.weight": (4224, 1408, 1),
        "input_blocks.5.1.encoder_kv.weight": (2816, 2816, 1),
        "input_blocks.5.1.norm_encoder.weight": (2816,),
        "input_blocks.5.1.proj_out.weight": (1408, 1408, 1),
        "input_blocks.15.1.qkv.weight": (8448, 2816, 1),
        "middle_block.0.in_layers.2.weight": (2816, 2816, 3, 3),
        "middle_block.1.qkv.bias": (8448,),
        "middle_block.2.out_layers.3.bias": (2816,),
        "output_blocks.0.0.skip_connection.weight": (2816, 5632, 1, 1),
        "output_blocks.3.2.in_layers.2.weight": (2816, 2816, 3, 3),  # the doubling block of the last level
        "output_blocks.15.0.skip_connection.weight": (704, 1408, 1, 1),
        "out.0.weight": (704,),
        "out.2.weight": (6, 704, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    tops = {name.split(".")[0] for name in shapes}
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks")}
    assert tops == {
        "time_embed", "input_blocks", "middle_block", "output_blocks", "out", "encoder_proj", "encoder_pooling"
    }  # fmt: skip
    assert blocks == set(range(16))
    assert not any("input_blocks.1.1" in name for name in shapes), "64 px has no attention"


def test_a_fresh_net_starts_at_zero_with_every_residual_branch_at_zero():
    unet = UNet(tiny())
    assert torch.equal(unet(*inputs()), torch.zeros(2, 6, 16, 16))
    zeros = {name for name, p in unet.named_parameters() if name.endswith("weight") and not p.any()}
    ends = [name for name, _ in unet.named_parameters() if name.endswith(("out_layers.3.weight", "proj_out.weight"))]
    assert zeros == {*ends, "out.2.weight"}


@pytest.mark.parametrize("out_channels", [3, 6])
def test_output_shape_at_the_config_size_and_at_others(out_channels):
    unet = randomised(tiny(out_channels=out_channels))
    assert unet.config.learn_sigma == (out_channels == 6)
    for size in (16, 12):
        out = unet(*inputs(size=size))
        assert out.shape == (2, out_channels, size, size)
        assert out.std() > 0.01


def test_every_parameter_and_every_input_matters():
    unet = randomised(tiny())
    x, t, text = inputs()
    x.requires_grad_()
    text.requires_grad_()
    unet(x, t, text).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (text.grad.abs().amax(dim=(0, 2)) > 0).all() and x.grad.abs().min() > 0
    with torch.no_grad():
        assert (unet(x, t + 1, text) - unet(x, t, text)).abs().max() > 1e-4


def test_text_encoded_once_gives_the_same_and_samples_do_not_mix():
    unet = randomised(tiny()).eval()
    x, t, text = inputs()
    with torch.no_grad():
        whole = unet(x, t, text)
        assert torch.equal(unet(x, t, unet.encode_text(text)), whole)
        alone = unet(x[1:], t[1:], text[1:])
    torch.testing.assert_close(alone, whole[1:], rtol=1e-5, atol=1e-6)


def test_timestep_embedding_is_cosines_then_sines_in_fp32():
    t = torch.tensor([0, 1, 999])
    emb = timestep_embedding(t, 8)
    freqs = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = t.double()[:, None] * freqs
    assert emb.dtype == torch.float32
    torch.testing.assert_close(emb.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [32, 192])
def test_1000_timesteps_stay_distinct_in_a_bf16_net(width):
    unet = randomised(tiny(model_channels=width)).bfloat16()
    seen: list[Tensor] = []
    unet.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    state = unet.encode_text(torch.randn(1, 5, 24))
    state = type(state)(state.states.expand(1000, -1, -1), state.pooled.expand(1000, -1))
    for block in [*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks]:
        block.forward = lambda h, emb, states, *skip: h[:, : unet.config.model_channels]
    with torch.no_grad():
        unet(torch.zeros(1000, 3, 2, 2), torch.arange(1000), state)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].unique(dim=0).shape[0] == 1000


def test_norms_keep_fp32_statistics_in_bf16():
    h = (torch.randn(2, 64, 8, 8) * 0.5 + 30).bfloat16()
    norm = group_norm(32, 64)
    exact = norm(h.float())
    assert (norm.bfloat16()(h).float() - exact).abs().max() <= exact.abs().max() * 2**-8
    tokens = (torch.randn(2, 5, 64) * 0.5 + 30).bfloat16()
    layer_norm = nn.LayerNorm(64)
    exact = layer_norm(tokens.float())
    assert (layer_norm.bfloat16()(tokens).float() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_attention_is_one_fused_call_over_text_and_pixels(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = real(q, k, v)
        calls.append(([tuple(a.shape) for a in (q, k, v)], type(out.grad_fn).__name__))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    AttentionBlock(64, 16, 32, 32)(torch.randn(2, 64, 4, 4), torch.randn(2, 32, 5))
    AttentionPooling(4, 24)(torch.randn(2, 5, 24))
    # The maths path, which SDPA takes without a word where the layout is not to its liking, keeps all the weights.
    flash = "ScaledDotProductFlashAttentionForCpuBackward0"
    assert calls == [
        ([(2, 4, 16, 16), (2, 4, 21, 16), (2, 4, 21, 16)], flash),
        ([(2, 4, 1, 6), (2, 4, 6, 6), (2, 4, 6, 6)], flash),
    ]


def test_config_round_trips_through_omegaconf():
    schema = OmegaConf.structured(UNetConfig)
    assert OmegaConf.to_object(schema) == UNetConfig()
    changed = OmegaConf.to_object(OmegaConf.merge(schema, TINY))
    assert isinstance(changed, UNetConfig) and changed == tiny()
    assert type(changed.channel_mult) is list
    with pytest.raises(AttributeError, match="chanel_mult"):
        changed.chanel_mult = [1]
    assert [f.name for f in dataclasses.fields(UNetConfig)] == [*UNetConfig.__slots__]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_channels": 40, "norm_groups": 32}, ["40", "norm_groups=32"]),
        ({"norm_groups": 0}, ["norm_groups=0"]),
        ({"norm_groups": 32}, ["32 channels", "norm_groups=32", "at most 8 groups"]),
        ({"model_channels": 33, "channel_mult": [32, 32]}, ["33", "even"]),
        ({"num_head_channels": 48}, ["64", "48"]),
        ({"num_head_channels": 48, "attention_resolutions": []}, ["64", "48"]),  # the middle block attends all the same
        ({"encoder_channels": 48}, ["48", "32 groups"]),
        ({"att_pool_heads": 5}, ["24", "5"]),
        ({"image_size": 15}, ["15", "2"]),
        ({"image_size": 0}, ["image_size=0"]),
        ({"num_res_blocks": 0}, ["num_res_blocks=0"]),
        ({"attention_resolutions": [32]}, ["32", "[16, 8]"]),
        ({"out_channels": 4}, ["4", "3", "6"]),
        ({"channel_mult": []}, ["channel_mult"]),
        ({"activation": "relu"}, ["relu", "gelu"]),
    ],
)
def test_unfit_config_names_its_numbers(changes, words):
    with pytest.raises(ValueError) as error:
        UNet(tiny(**changes))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, e: (x[:, :2], t, e), ["[2, 2, 16, 16]", "3"]),
        (lambda x, t, e: (x[0], t, e), ["[3, 16, 16]"]),
        (lambda x, t, e: (x[..., :15], t, e), ["16 x 15", "multiples of 2"]),
        (lambda x, t, e: (x, t, e[..., :23]), ["[2, 5, 23]", "24"]),
        (lambda x, t, e: (x, t, e[0]), ["[5, 24]"]),
        (lambda x, t, e: (x, t[:1], e), ["2 images", "[1]"]),
        (lambda x, t, e: (x, t[0], e), ["2 images", "[]"]),
        (lambda x, t, e: (x, t, e[:1]), ["2 images", "1 captions"]),
        (lambda x, t, e: (x, t.bfloat16(), e), ["bfloat16"]),
    ],
)
def test_unfit_input_names_its_numbers(change, words):
    unet = UNet(tiny())
    with pytest.raises(ValueError) as error:
        unet(*change(*inputs()))
    assert [word for word in words if word not in str(error.value)] == []


def test_compiled_stage_by_stage_it_is_the_same_net_and_equal_stages_are_compiled_once():
    unet = randomised(tiny(channel_mult=[1], num_res_blocks=3, attention_resolutions=[])).double()
    args = inputs()
    expected = [unet(*args), *torch.autograd.grad(unet(*args).square().mean(), list(unet.parameters()))]
    counters.clear()
    unet.compile_stages("aot_eager")
    out = unet(*args)
    out.square().mean().backward()
    found = [out, *(p.grad for p in unet.parameters())]
    for (name, _), value, right in zip([("out", 0), *unet.named_parameters()], found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-15, msg=name)
    # A convolution, residual blocks on the way in, in the middle and on the way out; the text, the time and the end.
    assert len(unet.input_blocks) + len(unet.output_blocks) + 1 == 9 and counters["stats"]["unique_graphs"] == 7
    with torch.compiler.set_stance("fail_on_recompile"):
        unet(args[0] + 1, args[1] + 1, args[2]).mean().backward()
    with pytest.raises(ValueError, match="embed the captions"):
        unet(args[0], args[1], args[2][..., :23])


@pytest.mark.parametrize(("groups", "warned"), [(32, True), (16, False)])
def test_a_run_whose_norms_take_much_of_the_colours_is_warned(caplog, groups, warned):
    config = Config(model=tiny(model_channels=64, norm_groups=groups), data=DataConfig(shards="/no/shards"))
    with pytest.raises(ValueError, match="shards"):
        find_inputs(config)
    assert ("norm_groups=32 leaves 2 channels a group" in caplog.text) == warned


def test_one_channel_a_group_erases_the_mean_of_each_channel():
    x = torch.randn(4, 32, 8, 8) + torch.randn(4, 32, 1, 1)
    spread = [float(group_norm(groups, 32)(x).mean((2, 3)).std()) for groups in (32, 8)]
    assert spread[0] < 1e-5 and spread[1] > 0.5
