"""The net of the second stage: the released names, what it does with the low-resolution image, what it costs."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from model.config import RECOMPUTE, UNetConfig
from model.convert import diffusers_config, to_diffusers
from model.diffusion import Diffusion
from model.super_resolution import SuperResolutionUNet, enlarge, make_net
from model.unet import UNet
from train.checkpoint.identity import TEXT_IDENTITY, run_digest
from train.compose import compose_config
from train.monitor.flops import training_flops
from train.monitor.step_memory import inputs, kept_bytes
from train.weights.pretrained import load_pretrained

# Parameters, and a digest of the names and shapes of the net of the package deepfloyd-if 1.0.1 with these numbers.
RELEASED = {"if_ii_l": (1_243_277_190, "c973720a44724d85"), "if_ii_m": (482_483_334, "6261adce122febab")}
NET = UNetConfig(
    image_size=16, low_res_size=4, model_channels=64, channel_mult=[1, 2], num_res_blocks=[1, 2],
    attention_resolutions=[8], num_head_channels=32, encoder_dim=24, encoder_channels=64, att_pool_heads=4,
    scale_skip_connection=True,
)  # fmt: skip


def read(repo: Path, name: str) -> UNetConfig:
    values = OmegaConf.merge(OmegaConf.structured(UNetConfig), OmegaConf.load(repo / "conf" / "model" / f"{name}.yaml"))
    return replace(OmegaConf.to_object(values), encoder_dim=4096)  # type: ignore[arg-type]


def digest(net: nn.Module) -> str:
    shapes = sorted((name, list(value.shape)) for name, value in net.state_dict().items())
    return hashlib.sha256("".join(f"{name} {shape}\n" for name, shape in shapes).encode()).hexdigest()[:16]


def randomised(config: UNetConfig = NET, recompute: str = "none") -> UNet:
    torch.manual_seed(0)
    net = make_net(config, recompute)
    for parameter in net.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=parameter[0].numel() ** -0.5)
    return net


def gradients(net: UNet, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    low_res = args[3].clone().requires_grad_()
    out = net(*args[:3], low_res, args[4])
    out.square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()} | {"out": out.detach(), "low_res": low_res.grad}


@pytest.mark.parametrize("name", RELEASED)
def test_names_shapes_and_number_of_the_parameters_are_those_of_the_original(repo, name):
    with torch.device("meta"):
        net = make_net(read(repo, name))
    assert (sum(p.numel() for p in net.parameters()), digest(net)) == RELEASED[name]


def test_the_large_net_is_diffusers_by_the_released_configuration(repo):
    """Those of the numbers in the unet/config.json of IF-II-L that are not diffusers' defaults."""
    assert diffusers_config(read(repo, "if_ii_l")) == {
        "sample_size": 256, "in_channels": 6, "out_channels": 6, "block_out_channels": [160, 320, 640, 960, 1280],
        "layers_per_block": [2, 2, 3, 5, 5], "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
        "act_fn": "gelu", "norm_num_groups": 32, "norm_eps": 1e-5, "attention_head_dim": 64,
        "cross_attention_dim": 1280, "cross_attention_norm": "group_norm", "only_cross_attention": False,
        "encoder_hid_dim": 4096, "addition_embed_type": "text", "addition_embed_type_num_heads": 64,
        "class_embed_type": "timestep", "time_embedding_dim": 1280, "time_embedding_act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142271248762552, "mid_block_scale_factor": 1.4142271248762552,
    }  # fmt: skip


def test_every_parameter_and_every_input_matters():
    net, args = randomised(), inputs(NET, 2, 5)
    found = gradients(net, args)
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    with torch.no_grad():
        assert (net(*args[:4], args[4] + 1) - found["out"]).abs().max() > 1e-4
        known = net.encode_text(args[2])
        assert torch.equal(net(args[0], args[1], known, *args[3:]), found["out"])


def test_an_enlarged_image_keeps_its_corners():
    low_res = torch.randn(1, 3, 4, 4)
    large = enlarge(low_res, 16)
    assert torch.equal(large[..., ::15, ::15], low_res[..., ::3, ::3]) and large.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_the_same_gradients_to_the_bit_whatever_is_recomputed(recompute):
    args = inputs(NET, 2, 5)
    expected, found = gradients(randomised(), args), gradients(randomised(recompute=recompute), args)
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_memory_and_flops_are_counted():
    net, args = randomised(), inputs(NET, 2, 5)
    with FakeTensorMode():
        fake, fakes = make_net(NET), inputs(NET, 2, 5)
        counted = kept_bytes(lambda: fake(*fakes))
    assert counted == kept_bytes(lambda: net(*args))

    first_stage = replace(NET, low_res_size=0)
    emb, pixels = NET.time_embed_dim, NET.image_size**2
    more = 2 * (3 * 9 * 64 * pixels + 64 * emb + emb * emb)  # of the first convolution, and of the level's embedding
    assert training_flops(NET, 5).forward == training_flops(first_stage, 5).forward + more


@pytest.mark.parametrize("config", [NET, replace(NET, self_attention=False)], ids=["with", "without"])
def test_released_weights_are_read(tmp_path, config):
    net = randomised(config)
    theirs = UNet2DConditionModel(**diffusers_config(config))
    theirs.load_state_dict(to_diffusers(net.state_dict(), config), strict=True)
    theirs.save_pretrained(tmp_path / "unet")
    loaded = load_pretrained(tmp_path, config)
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_pretrained(tmp_path / "pytorch_model.bin", config).keys() == loaded.keys()
    with pytest.raises(ValueError, match=r"model\.scale_skip_connection=True, this one has False"):
        load_pretrained(tmp_path, replace(config, scale_skip_connection=False))
    with pytest.raises(ValueError, match="att_pool_heads=4, this one has 2"):
        load_pretrained(tmp_path, replace(config, att_pool_heads=2))
    with pytest.raises(ValueError, match="are of IF's second stage, this net is of the first"):
        load_pretrained(tmp_path / "pytorch_model.bin", replace(config, low_res_size=0))


def test_a_net_of_the_first_stage_has_the_hash_of_before_there_was_a_second():
    """By it the exports on a hub know their run."""
    config = {
        "seed": 0, "global_batch": 8, "diffusion_steps": 1000, "model": {"encoder_dim": 4096}, "lora": {"rank": 0},
        "data": {"streams": 1, "phases": [], "shuffle_block": 4, "mixture": {}},
    }  # fmt: skip
    manifest = {"config": config, "data": [], "text": dict.fromkeys(TEXT_IDENTITY), "base": None}
    assert run_digest(manifest) == "c124632bea8ab7851947a433e478fc75"
    manifest["config"] = config | {"model": {"encoder_dim": 4096, "self_attention": False}}
    assert run_digest(manifest) != "c124632bea8ab7851947a433e478fc75"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, e, low, aug: (x, t, e, low[..., :4, :4], aug), ["[2, 3, 4, 4]", "[2, 3, 16, 16]", "enlarge"]),
        (lambda x, t, e, low, aug: (x, t, e, low[:1], aug), ["[1, 3, 16, 16]", "one for each image"]),
        (lambda x, t, e, low, aug: (x, t, e, low, aug[:1]), ["[1] of torch.int64", "[2] of torch.int64"]),
        (lambda x, t, e, low, aug: (x, t, e, low, aug.bfloat16()), ["[2] of torch.bfloat16"]),
        (lambda x, t, e, low, aug: (x[:, :2], t, e, low[:, :2], aug), ["[2, 2, 16, 16]", "[N, 3, H, W]"]),
        (lambda x, t, e, low, aug: (x[:1], t, e, low[:1], aug), ["1 images, timesteps are [2]", "2 captions"]),
    ],
)
def test_unfit_input_names_its_numbers(change, words):
    with pytest.raises(ValueError) as error:
        SuperResolutionUNet(NET)(*change(*inputs(NET, 2, 5)))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_res_size": 16}, "model.low_res_size=16 must be smaller than model.image_size=16"),
        ({"low_res_size": -1}, "model.low_res_size=-1 must be smaller"),
        ({"num_res_blocks": [1]}, "model.num_res_blocks=[1] must be a whole number from 1 on, or a list of 2"),
        ({"num_res_blocks": [1, 0]}, "model.num_res_blocks=[1, 0] must be"),
        ({"num_res_blocks": ["some", "2"]}, "model.num_res_blocks=['some', 2] must be"),
        ({"num_res_blocks": 1.5}, "model.num_res_blocks=1.5 must be"),
    ],
)
def test_unfit_configurations_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        replace(NET, **change)
    assert message in str(error.value)


def test_a_training_takes_blocks_by_level():
    config = compose_config(["+experiment=if_i_m", "model.num_res_blocks=[1,2,3,1]"])
    assert config.model.res_blocks == [1, 2, 3, 1]


@pytest.mark.slow
def test_compiled_stage_by_stage_it_is_the_same_net():
    net, args = randomised(), inputs(NET, 2, 5)
    expected = gradients(net, args)
    net.zero_grad()
    net.compile_stages("aot_eager")
    found = gradients(net, args)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(net, (args[0] + 1, args[1] + 1, args[2], args[3] + 1, args[4] + 1))


# The package itself: `make bench` puts it into .bench; PYTHONPATH=.bench names it to the tests.
def original(config: UNetConfig) -> nn.Module:
    where = "run `make bench`, then the tests with PYTHONPATH=.bench"
    unet = pytest.importorskip("deepfloyd_if.model.unet", reason=where)
    respace = pytest.importorskip("deepfloyd_if.model.respace", reason=where)
    noising = respace.create_gaussian_diffusion(
        steps=1000, learn_sigma=True, noise_schedule="cosine", rescale_timesteps=True, rescale_learned_sigmas=True,
        timestep_respacing="1000",
    )  # fmt: skip
    resolutions = ",".join(map(str, config.attention_resolutions))
    return unet.SuperResUNetModel(
        noising, in_channels=6, model_channels=config.model_channels, out_channels=6, activation="gelu",
        num_res_blocks=config.res_blocks, attention_resolutions=resolutions, image_size=config.image_size,
        encoder_dim=config.encoder_dim, encoder_channels=config.encoder_channels, att_pool_heads=config.att_pool_heads,
        disable_self_attentions=False if config.self_attention else resolutions, channel_mult=config.channel_mult,
        num_head_channels=config.num_head_channels, use_scale_shift_norm=True, resblock_updown=True,
        efficient_activation=True, scale_skip_connection=config.scale_skip_connection,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", [NET, replace(NET, self_attention=False)], ids=["with", "without"])
def test_same_outputs_and_gradients_as_the_original(config):
    ours, theirs = randomised(config), original(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, text_emb, *_ = inputs(config, 2, 7)
    low_res, aug_t = torch.randn(2, 3, 4, 4), torch.tensor([250, 250])
    torch.manual_seed(5)  # the original draws the noise of low_res inside
    expected = theirs(x, t, low_res=low_res, aug_level=0.25, text_emb=text_emb)
    torch.manual_seed(5)
    noised = Diffusion(1000).q_sample(enlarge(low_res, 16), aug_t, torch.randn(2, 3, 16, 16))
    out = ours(x, t, text_emb, noised, aug_t)
    assert expected.std() > 0.1 and (out - expected).abs().max() < 1e-5 * expected.abs().max()

    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    found, right = ({name: p.grad for name, p in net.named_parameters()} for net in (ours, theirs))
    # Adding a constant to all keys changes no softmax: these gradients are rounding alone.
    rows = "k_proj.bias" if config.self_attention else ("k_proj.bias", "encoder_kv.bias")
    off = {
        name: ((found[name] - right[name]).abs().max() / right[name].abs().max()).item()
        for name in right
        if not name.endswith(rows)
    }
    assert found.keys() == right.keys() and max(off.values()) < 1e-4, max(off.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_digests_are_those_of_the_package(repo, name):
    with torch.device("meta"):
        net = original(read(repo, name))
    assert (sum(p.numel() for p in net.parameters()), digest(net)) == RELEASED[name]
