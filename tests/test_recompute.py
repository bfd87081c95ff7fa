"""What is kept for backward: the same gradients to the bit, and fewer bytes."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from data.text.meta import TextMeta
from model.config import RECOMPUTE, UNetConfig
from model.unet import UNet
from tests.benchmarks.nets import DIFFUSERS, OURS
from tests.benchmarks.unet_memory import per_image
from train.config import Config, OptimConfig
from train.inputs import Inputs
from train.monitor.step_memory import kept_bytes

ACTIVATIONS = ("gelu", "gelu_3bit")


NET = UNetConfig(
    image_size=16, model_channels=32, norm_groups=8, channel_mult=[1, 2, 3], num_res_blocks=1,
    attention_resolutions=[8, 4], num_head_channels=16, encoder_dim=24, encoder_channels=64, att_pool_heads=4,
)  # fmt: skip


def net(activation: str = "gelu", recompute: str = "none") -> UNet:
    torch.manual_seed(0)
    unet = UNet(replace(NET, activation=activation), recompute)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return x.to(dtype), torch.tensor([3, 440]), text.to(dtype)


def gradients(unet: UNet, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    args = (args[0].requires_grad_(), args[1], args[2].requires_grad_())
    out = unet(*args)
    out.float().square().mean().backward()
    named = {name: p.grad for name, p in unet.named_parameters()}
    return named | {"out": out.detach(), "x": args[0].grad, "text_emb": args[2].grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_the_same_gradients_to_the_bit(recompute, activation, dtype):
    expected = gradients(net(activation=activation).to(dtype), inputs(dtype))
    found = gradients(net(activation=activation, recompute=recompute).to(dtype), inputs(dtype))
    assert min(value.abs().max() for value in expected.values()) > 0
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_rounding_the_slope_makes_a_difference_that_the_test_above_would_see():
    exact, rounded = (gradients(net(activation=a), inputs())["input_blocks.0.0.weight"] for a in ACTIVATIONS)
    assert not torch.equal(exact, rounded)


def kept(activation: str, recompute: str, fake: bool = False) -> int:
    if fake:
        with FakeTensorMode():
            return kept(activation, recompute)
    unet, args = net(activation=activation, recompute=recompute), inputs()
    return kept_bytes(lambda: unet(*args))


def test_each_choice_keeps_less():
    exact, few_bit, cheap, blocks = (
        kept("gelu", "none"), kept("gelu_3bit", "none"), *(kept("gelu_3bit", m) for m in RECOMPUTE[1:])
    )  # fmt: skip
    assert few_bit < 0.8 * exact and cheap < 0.6 * few_bit and blocks < 0.5 * cheap
    # An activation that is done again leaves nothing behind; that of the time embedding isn't.
    assert kept("gelu", "cheap") == pytest.approx(cheap, rel=1e-3)


def test_bytes_of_the_m_size_against_diffusers():
    peer, exact, few_bit, cheap = (
        per_image(name, "M", torch.bfloat16) for name in (DIFFUSERS, *list(OURS)[:3])
    )  # fmt: skip
    assert exact < 0.85 * peer and few_bit <= 0.7 * peer and cheap <= 0.35 * peer


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fake_tensors_tell_the_bytes_of_real_ones(recompute):
    assert kept("gelu_3bit", recompute, fake=True) == kept("gelu_3bit", recompute)


def test_bytes_of_a_known_graph():
    x, weight = torch.randn(10, 7), nn.Linear(7, 5)
    # tanh keeps its result; the linear layer keeps its input, which isn't counted.
    assert kept_bytes(lambda: torch.tanh(weight(x)).sum()) == 10 * 5 * 4
    with torch.no_grad():
        assert kept_bytes(lambda: torch.tanh(weight(x)).sum()) == 0


@pytest.mark.parametrize("recompute", ["cheap", pytest.param("blocks", marks=pytest.mark.slow)])
def test_compiles_stage_by_stage_without_recompiling(recompute):
    unet, args = net(recompute=recompute), inputs()
    expected = unet(*args)
    unet.compile_stages("aot_eager")
    out = unet(*args)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.mean().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        unet(args[0] + 1, args[1] + 1, args[2]).mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


def print_kept_of_a_run() -> None:
    """The bytes that the net of a run keeps, a line for each choice; as a process of its own, for it joins a group."""
    from train.engine import init_distributed
    from train.loop import build

    _, ranks, device = init_distributed()
    args = inputs()
    for recompute in RECOMPUTE:
        config = Config(model=NET, recompute=recompute, precision="fp32", optim=OptimConfig("adamw"))
        unet = build(config, Inputs([], TextMeta("", "", "", 5, 24, "float16", "float32", "")), ranks, device).model
        print(recompute, kept_bytes(lambda unet=unet: unet(*args)))


def test_a_run_recomputes_as_it_is_configured(repo):
    code = "from tests.test_recompute import print_kept_of_a_run; print_kept_of_a_run()"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-3:] == [f"{recompute} {kept('gelu', recompute)}" for recompute in RECOMPUTE]


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="recompute=all must be one of none, cheap, blocks"):
        net(recompute="all")
