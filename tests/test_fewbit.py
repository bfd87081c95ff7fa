import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from model.config import UNetConfig
from model.fewbit import FewBitGELU, best_steps, decode, encode, pack, unpack
from model.unet import UNet

ALL_BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def slope(x: Tensor) -> Tensor:
    """GELU's derivative, by autograd in float64."""
    x = x.double().detach().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.gelu(x).sum(), x)
    return grad


def steps_at(x: Tensor, bits: int) -> Tensor:
    """The level of the piece that each x is in, found the plain way."""
    borders, levels = (torch.tensor(v, dtype=torch.float64) for v in best_steps(bits))
    return levels[(x.double()[..., None] > borders).sum(-1)]


def squared_error(bits: int) -> float:
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    return torch.trapezoid((slope(x) - steps_at(x, bits)) ** 2, x).item()


@pytest.mark.parametrize(("bits", "published"), [(1, 0.1410), (2, 0.0406), (3, 0.0119), (4, 0.0031)])
def test_error_is_the_paper_s(bits, published):
    """Table of arXiv 2202.00441: GELU's error under the even weight on [-10, 10], given to 4 digits."""
    assert squared_error(bits) == pytest.approx(published, abs=0.00005)


@ALL_BITS
def test_steps_satisfy_both_conditions_of_a_minimum(bits):
    borders, levels = best_steps(bits)
    assert len(borders) == 2**bits - 1 and len(levels) == 2**bits
    assert borders == sorted(borders)
    # Each level is its piece's mean slope, each border lies where the slope is half way between its levels.
    edges = torch.tensor([-10, *borders, 10], dtype=torch.float64)
    means = nn.functional.gelu(edges).diff() / edges.diff()
    torch.testing.assert_close(means, torch.tensor(levels, dtype=torch.float64), rtol=0, atol=1e-9)
    half_way = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(levels)], dtype=torch.float64)
    torch.testing.assert_close(slope(torch.tensor(borders)), half_way, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bits", "points"), [(1, 401), (2, 101)])
def test_no_borders_are_better_by_brute_force(bits, points):
    """Every choice of borders on a grid, without the symmetry that the search uses."""
    fine = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    y = slope(fine)
    sums = torch.stack([torch.cat([torch.zeros(1).double(), v.cumsum(0)]) for v in (torch.ones_like(y), y, y * y)])
    grid = torch.linspace(-4, 4, points, dtype=torch.float64)
    choices = torch.combinations(torch.arange(points), 2**bits - 1)
    places = torch.searchsorted(fine, grid[choices])
    ends = torch.zeros(len(choices), 1, dtype=torch.long)
    count, first, second = sums[:, torch.cat([ends, places, ends + len(fine)], 1)].diff(dim=-1)
    errors = (second - first**2 / count).sum(1) * 20 / 20_000
    assert errors.min() >= squared_error(bits) - 1e-5
    nearest = grid[choices[errors.argmin()]]
    assert (nearest - torch.tensor(best_steps(bits)[0])).abs().max() <= 8 / (points - 1)


@ALL_BITS
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_packing_loses_nothing_and_takes_its_bits(bits, n):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, n), codes)
    assert {p.dtype for p in packed} == {torch.uint8}
    assert sum(p.numel() for p in packed) <= math.ceil(n * bits / 8) + 1


@ALL_BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_exact_and_backward_the_levels(bits, dtype):
    x = torch.linspace(-5, 5, 1003).to(dtype)
    # One spacing of the dtype around a border, either level is right.
    borders = torch.tensor(best_steps(bits)[0], dtype=torch.float64)
    away = ((x.double()[:, None] - borders).abs() > 0.01).all(1)
    grad = torch.randn(1003, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, exact = x.clone().requires_grad_(), nn.functional.gelu(x)
    y = FewBitGELU(bits)(ours)
    assert torch.equal(y, exact) and y.dtype == dtype
    y.backward(grad)
    assert ours.grad.dtype == dtype
    expected = grad.double() * steps_at(x, bits)
    torch.testing.assert_close(
        ours.grad.double()[away], expected[away], rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-7
    )
    # The biggest error of a rounded slope; at 1 bit, that of a step where GELU's slope is 1/2.
    assert (ours.grad.double() / grad.double() - slope(x)).abs().max() < [0.51, 0.34, 0.15, 0.08][bits - 1]


@ALL_BITS
def test_encode_counts_outwards_on_both_sides(bits):
    borders, levels = best_steps(bits)
    inside = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise([-10, *borders, 10])])
    half = 2 ** (bits - 1)
    codes = encode(inside, borders)
    assert codes.tolist() == [*range(half - 1, -1, -1), *range(half, 2 * half)]
    assert torch.equal(decode(codes, torch.tensor(levels)), torch.tensor(levels))
    far = torch.tensor([-math.inf, -1e30, 1e30, math.inf])
    assert decode(encode(far, borders), torch.tensor(levels)).tolist() == pytest.approx(
        [levels[0], levels[0], levels[-1], levels[-1]]
    )


@ALL_BITS
def test_keeps_that_many_bits_of_each_element(bits):
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        FewBitGELU(bits)(x)
    codes = [t for t in kept if t.dtype == torch.uint8]
    assert sum(t.numel() for t in codes) * 8 == bits * x.numel()
    assert sum(t.numel() for t in kept if t.dtype != torch.uint8) == 2**bits


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::3],
        lambda x: x[:, :0],
        lambda x: x[0, 0],
        lambda x: x.expand(3, -1, -1),
        lambda x: x[None, :, :, None].to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "empty", "scalar", "expanded", "channels last"],
)
@ALL_BITS
def test_any_layout(bits, view):
    base = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = FewBitGELU(bits)(view(base))
    grad = torch.randn(y.shape).transpose(0, -1).contiguous().transpose(0, -1) if y.ndim else torch.randn(())
    (got,) = torch.autograd.grad(y, base, grad)
    slopes = steps_at(base.detach(), bits).float().requires_grad_()
    (expected,) = torch.autograd.grad(view(slopes), slopes, grad)
    torch.testing.assert_close(got, expected * slopes.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(y, nn.functional.gelu(view(base)))


def test_double_backward_is_refused():
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"2 bits has no second derivative.*activation='gelu'"):
        torch.autograd.grad(FewBitGELU(2)(x).sum(), x, create_graph=True)


def test_the_table_survives_moves_casts_and_meta():
    expected = torch.tensor(best_steps(3)[1], dtype=torch.float32)
    with torch.device("meta"):
        born_on_meta, stays_there = FewBitGELU(3), nn.Sequential(FewBitGELU(3)).bfloat16()
    assert stays_there[0].levels.is_meta
    for module in (
        FewBitGELU(3).bfloat16(),
        copy.deepcopy(stays_there).to("cpu", torch.bfloat16)[0],
        copy.deepcopy(FewBitGELU(3)).half(),
        nn.Sequential(born_on_meta).to_empty(device="cpu")[0],
    ):
        assert torch.equal(module.levels, expected)
    assert not FewBitGELU(3).state_dict(), "released weights know no such name"


@pytest.mark.parametrize("bits", [0, 5])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        FewBitGELU(bits)
    with pytest.raises(ValueError, match=rf"model.activation=gelu_{bits}bit must be one of .*gelu_1bit"):
        UNetConfig(activation=f"gelu_{bits}bit")


@pytest.mark.parametrize("bits", [2, 3])
def test_compiles_whole(bits):
    module = FewBitGELU(bits)
    x = torch.randn(3, 11, requires_grad=True)
    grad = torch.randn(3, 11)
    (expected,) = torch.autograd.grad(module(x), x, grad)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, nn.functional.gelu(x))
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, expected)


def test_in_the_net_outputs_are_the_same_and_gradients_near():
    config = UNetConfig(
        image_size=16,
        model_channels=64,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[8],
        encoder_dim=32,
        encoder_channels=64,
        att_pool_heads=4,
    )
    torch.manual_seed(0)
    exact = UNet(config)
    for parameter in exact.parameters():
        nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.5)
    args = (torch.randn(2, 3, 16, 16), torch.tensor([5, 700]), torch.randn(2, 6, 32))
    weight = torch.randn(2, 6, 16, 16)
    out = exact(*args)
    (out * weight).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in exact.parameters()])
    gaps = []
    for bits in (1, 2, 3, 4):
        few = UNet(UNetConfig(**{**{f: getattr(config, f) for f in config.__slots__}, "activation": f"gelu_{bits}bit"}))
        few.load_state_dict(exact.state_dict(), strict=True)
        few_out = few(*args)
        assert torch.equal(few_out, out)
        (few_out * weight).sum().backward()
        few_flat = torch.cat([p.grad.flatten() for p in few.parameters()])
        gaps.append(((few_flat - flat).norm() / flat.norm()).item())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.15, gaps
