"""The net against diffusers' UNet2DConditionModel with the same weights, all of them random."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from model.config import UNetConfig
from model.convert import diffusers_config, from_diffusers, to_diffusers
from model.super_resolution import make_net
from model.unet import UNet

# 64 channels at least: with one channel a group, a norm would wipe out the biases before it and their gradients.
SHAPES = {
    "as released": UNetConfig(
        image_size=32,
        model_channels=64,
        channel_mult=[1, 2, 3],
        num_res_blocks=2,
        attention_resolutions=[16, 8],
        num_head_channels=16,
        encoder_dim=48,
        encoder_channels=64,
        att_pool_heads=4,
    ),
    "deeper, eps alone": UNetConfig(
        image_size=16,
        in_channels=1,
        out_channels=1,
        model_channels=64,
        channel_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        attention_resolutions=[8],
        num_head_channels=32,
        encoder_dim=40,
        encoder_channels=64,
        att_pool_heads=8,
    ),
    "attention at every level, text not projected": UNetConfig(
        image_size=16,
        model_channels=64,
        channel_mult=[1, 2],
        num_res_blocks=3,
        attention_resolutions=[16, 8],
        num_head_channels=64,
        encoder_dim=96,
        encoder_channels=96,
        att_pool_heads=3,
    ),
}
SHAPES["8 groups"] = replace(SHAPES["as released"], norm_groups=8)
SHAPES["second stage"] = UNetConfig(
    image_size=16,
    low_res_size=4,
    model_channels=64,
    channel_mult=[1, 1],
    num_res_blocks=[1, 2],
    attention_resolutions=[8],
    scale_skip_connection=True,
    num_head_channels=32,
    encoder_dim=48,
    encoder_channels=64,
    att_pool_heads=4,
)
SHAPES["second stage, attention to the text alone"] = replace(SHAPES["second stage"], self_attention=False)


@pytest.fixture(params=SHAPES)
def pair(request) -> tuple[UNet, UNet2DConditionModel]:
    return same_weights(SHAPES[request.param])


def same_weights(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    ours = make_net(config)
    for parameter in ours.parameters():
        # Zero-initialised layers would make parity empty, and norms of gain 1 would hide a mix-up of theirs.
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    theirs = UNet2DConditionModel(**diffusers_config(config))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config), strict=True)
    return ours, theirs


def inputs(config: UNetConfig, n: int = 2) -> tuple[Tensor, ...]:
    """x, t and text_emb; of a second stage low_res and aug_t too."""
    generator = torch.Generator().manual_seed(1)
    x, low_res = torch.randn(2, n, config.in_channels, config.image_size, config.image_size, generator=generator)
    text_emb = torch.randn(n, 7, config.encoder_dim, generator=generator)
    t, aug_t = torch.tensor([3, 941])[:n], torch.tensor([250, 7])[:n]
    return (x, t, text_emb, low_res, aug_t) if config.low_res_size else (x, t, text_emb)


def theirs_of(theirs: UNet2DConditionModel, x: Tensor, t: Tensor, text_emb: Tensor, *second_stage: Tensor) -> Tensor:
    """The output for the same inputs, given as IFPipeline and IFSuperResolutionPipeline do."""
    if not second_stage:
        return theirs(x, t, text_emb).sample
    low_res, aug_t = second_stage
    return theirs(torch.cat([x, low_res], dim=1), t, text_emb, class_labels=aug_t).sample


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def test_same_outputs_and_gradients(pair):
    assert_same(*pair, inputs(pair[0].config))


@pytest.mark.slow
def test_same_outputs_and_gradients_at_the_medium_size():
    config = UNetConfig(model_channels=192, encoder_dim=4096, encoder_channels=768)
    assert_same(*same_weights(config), inputs(config, n=1))


def assert_same(ours: UNet, theirs: UNet2DConditionModel, args: tuple[Tensor, ...]) -> None:
    out, expected = ours(*args), theirs_of(theirs, *args)
    assert expected.std() > 0.1
    assert distance(out, expected) < 1e-5

    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    grads = to_diffusers({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    expected_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == expected_grads.keys()
    # A constant added to every key changes no softmax: the gradient of the pooling's key bias is rounding alone, and so
    # is that of the text's where no other keys are.
    rounding = ["pool.k_proj.bias"] if ours.config.self_attention else ["pool.k_proj.bias", "add_k_proj.bias"]
    off = {name: distance(grads[name], expected_grads[name]) for name in grads if not name.endswith(tuple(rounding))}
    assert max(off.values()) < 1e-4, max(off.items(), key=lambda item: item[1])


@pytest.mark.parametrize("pair", list(SHAPES)[1:], indirect=True)
def test_bf16_is_near_fp32(pair):
    ours, _ = pair
    args = inputs(ours.config)
    with torch.no_grad():
        exact = ours(*args)
        half = ours.bfloat16()(*args)
    assert half.dtype == torch.bfloat16
    # Relative to the spread of the output, in the mean: some 30 layers of rounding to 8 bits.
    assert ((half.float() - exact).square().mean().sqrt() / exact.std()).item() < 0.03


def test_names_go_to_diffusers_and_back(pair):
    ours, theirs = pair
    back = from_diffusers(theirs.state_dict(), ours.config)
    state = ours.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    ours.load_state_dict(back, strict=True)


def test_parameter_count_at_the_medium_size():
    config = UNetConfig(model_channels=192, encoder_dim=4096, encoder_channels=768)
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel(**diffusers_config(config))
    shapes = {name: value.shape for name, value in to_diffusers(ours.state_dict(), config).items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 371_605_830


def test_weights_that_do_not_fit_are_named():
    config = SHAPES["as released"]
    with torch.device("meta"):
        state = UNet(config).state_dict()
    del state["out.2.bias"]
    state["extra.weight"] = torch.zeros(1)
    for convert in (to_diffusers, from_diffusers):
        with pytest.raises(ValueError, match=r"missing.*out\.2\.bias|missing.*add_embedding"):
            convert(state, config)
    with pytest.raises(ValueError, match=r"1 unknown \(extra\.weight\)"):
        to_diffusers(state, config)


def test_a_first_level_wider_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"channel_mult=\[2, 4\]"):
        diffusers_config(UNetConfig(channel_mult=[2, 4], attention_resolutions=[32]))
