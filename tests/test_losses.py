import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from model.config import UNetConfig
from model.diffusion import Diffusion, Gaussian, cosine_betas
from model.losses import discretized_gaussian_nll, gaussian_kl, training_losses
from model.unet import UNet

BOTH = pytest.mark.parametrize("timesteps", [1000, 250])


def batch(timesteps: int, t: list[int], seed: int = 0) -> tuple[Diffusion, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """diffusion, model_output near the truth, x_start of 8-bit levels, x_t, t, noise"""
    generator = torch.Generator().manual_seed(seed)
    n = len(t)
    d = Diffusion(timesteps)
    x = torch.randint(0, 256, (n, 2, 2, 2), generator=generator) / 127.5 - 1
    noise = torch.randn(x.shape, generator=generator)
    eps = noise + 0.3 * torch.randn(x.shape, generator=generator)
    values = torch.rand(x.shape, generator=generator) * 2 - 1
    steps = torch.tensor(t)
    return d, torch.cat([eps, values], 1), x, d.q_sample(x, steps, noise), steps, noise


def density(grid: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return torch.exp(-0.5 * (grid - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()


def test_gaussian_kl_is_the_integral():
    means, variances = torch.tensor([0.0, 0.5, -1.0, 0.0]).double(), torch.tensor([1.0, 0.25, 2.0, 1e-3]).double()
    p, q = Gaussian(means, variances.log()), Gaussian(means.flip(0) * 0.5, (variances * 1.7).log())
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)[:, None]
    a = density(grid, p.mean, p.log_variance.exp())
    log_b = -0.5 * ((grid - q.mean) ** 2 / q.log_variance.exp() + q.log_variance + math.log(2 * math.pi))
    log_a = -0.5 * ((grid - p.mean) ** 2 / p.log_variance.exp() + p.log_variance + math.log(2 * math.pi))
    torch.testing.assert_close(gaussian_kl(p, q), torch.trapezoid(a * (log_a - log_b), grid, dim=0), rtol=1e-6, atol=0)
    assert not gaussian_kl(p, p).any()


@BOTH
def test_vb_is_the_numerical_kl_in_bits_times_timesteps_over_1000(timesteps):
    """Both Gaussians built anew in float64: the true one by Bayes' rule on a grid, the model's from its eps."""
    d, output, x, x_t, t, noise = batch(timesteps, [1, 2, timesteps // 2, timesteps - 2])
    got = training_losses(d, output, x, x_t, t, noise)["vb"]
    betas = cosine_betas(timesteps)
    bars = (1 - betas).cumprod(0)
    for i, step in enumerate(t.tolist()):
        beta, bar, bar_prev = betas[step], bars[step], bars[step - 1]
        x0, xt = x[i].double().flatten(), x_t[i].double().flatten()
        eps, values = (part.double().flatten() for part in output[i].chunk(2))
        mean = (xt - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()
        smallest = beta * (1 - bar_prev) / (1 - bar)
        share = (values + 1) / 2
        variance = torch.exp(share * beta.log() + (1 - share) * smallest.log())

        spread = smallest.sqrt() * 12
        centre = (xt - beta / (1 - bar).sqrt() * noise[i].double().flatten()) / (1 - beta).sqrt()
        grid = centre + torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None] * spread
        true = density(grid, bar_prev.sqrt() * x0, 1 - bar_prev) * density(xt, (1 - beta).sqrt() * grid, beta)
        true = true / torch.trapezoid(true, grid, dim=0)
        log_ratio = true.clamp(min=1e-300).log() + 0.5 * (
            (grid - mean) ** 2 / variance + (2 * math.pi * variance).log()
        )
        kl = torch.trapezoid(true * log_ratio, grid, dim=0).mean() / math.log(2)
        assert got[i].item() == pytest.approx(kl.item() * timesteps / 1000, rel=2e-3), step


@BOTH
def test_vb_at_zero_is_the_nll_of_the_8_bit_level(timesteps):
    d, output, x, _, t, noise = batch(timesteps, [0])
    x[0, 0, 0] = torch.tensor([-1.0, 1.0])  # both tails
    x_t = d.q_sample(x, t, noise)
    got = training_losses(d, output, x, x_t, t, noise)["vb"]
    betas = cosine_betas(timesteps)
    eps, values = output.double().chunk(2, dim=1)
    mean = (x_t.double() - betas[0].sqrt() * eps) / (1 - betas[0]).sqrt()
    smallest = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    std = torch.exp(0.25 * ((values + 1) * betas[0].log() + (1 - values) * smallest.log()))
    nll = 0.0
    for level, m, s in zip(x.flatten().tolist(), mean.flatten().tolist(), std.flatten().tolist(), strict=True):
        upper = 1.0 if level > 0.999 else 0.5 * math.erfc(-(level + 1 / 255 - m) / s / math.sqrt(2))
        lower = 0.0 if level < -0.999 else 0.5 * math.erfc(-(level - 1 / 255 - m) / s / math.sqrt(2))
        nll -= math.log(upper - lower) / x.numel()
    assert got.item() == pytest.approx(nll / math.log(2) * timesteps / 1000, rel=1e-3)


def test_the_masses_of_all_256_levels_add_to_one():
    levels = torch.arange(256).double() / 127.5 - 1
    for mean, std in ((0.0, 0.5), (0.9, 0.01), (-1.2, 0.3)):
        q = Gaussian(torch.tensor(mean).double(), torch.tensor(2 * math.log(std)).double())
        mass = torch.exp(-discretized_gaussian_nll(levels, q))
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("z", [-4.0, -5.4, -5.6, -6.0, -6.5, -7.0])
def test_levels_far_from_the_mean_have_their_likelihood_and_a_gradient(z):
    """The tails and a middle level, in fp32, against SciPy's logarithms of the masses in float64."""
    std = 0.01
    for x, edges in ((-1.0, (-math.inf, -1 + 1 / 255)), (1.0, (1 - 1 / 255, math.inf)), (0.0, (-1 / 255, 1 / 255))):
        # The edge of the level that is nearer to the mean lies |z| standard deviations from it.
        mean = edges[0] + z * std if x == 1 else edges[1] - z * std
        gaussian = [torch.tensor(v, requires_grad=True) for v in (mean, 2 * math.log(std))]
        nll = discretized_gaussian_nll(torch.tensor(x), Gaussian(*gaussian))
        exact = norm(gaussian[0].double().item(), math.exp(gaussian[1].double().item() / 2))
        lower, upper = (exact.logcdf if x < 1 else exact.logsf)([edges[0], edges[1]])
        log_mass = max(lower, upper) + math.log1p(-math.exp(-abs(upper - lower)))
        assert nll.item() == pytest.approx(-log_mass, rel=1e-4), x
        nll.backward()
        assert all(value.grad.abs() > 1 for value in gaussian), x


def test_mse_and_vb_train_apart():
    d, output, x, x_t, t, noise = batch(1000, [0, 1, 500, 999])
    output.requires_grad_()
    losses = training_losses(d, output, x, x_t, t, noise)
    torch.testing.assert_close(losses["mse"], (output[:, :2] - noise).square().mean(dim=(1, 2, 3)))
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])
    (by_vb,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    (by_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert not by_vb[:, :2].any() and by_vb[:, 2:].abs().flatten(1).amax(1).min() > 0
    assert not by_mse[:, 2:].any() and by_mse[:, :2].any()


def test_eps_alone_has_no_vb():
    d, output, x, x_t, t, noise = batch(1000, [3, 4])
    losses = training_losses(d, output[:, :2], x, x_t, t, noise)
    assert set(losses) == {"loss", "mse", "mse_mean"} and torch.equal(losses["loss"], losses["mse"])


def test_the_error_of_the_mean_is_one_if_it_is_not_predicted_and_the_mse_of_a_white_error():
    generator, d, t = torch.Generator().manual_seed(0), Diffusion(1000), torch.full((400,), 500)
    noise = torch.randn((400, 3, 16, 16), generator=generator)

    def measured(eps: Tensor) -> dict[str, float]:
        return {k: float(v.mean()) for k, v in training_losses(d, eps, noise, noise, t, noise).items()}

    for predicted, mean in ((torch.zeros_like(noise), 1.0), (noise - noise.mean((2, 3), keepdim=True), 1.0)):
        assert measured(predicted)["mse_mean"] == pytest.approx(mean, abs=0.1)
    assert measured(noise - noise.mean((2, 3), keepdim=True))["mse"] == pytest.approx(1 / 256, abs=0.1 / 256)
    assert measured(noise.mean((2, 3), keepdim=True).expand_as(noise))["mse_mean"] < 1e-6
    white = measured(noise + 0.3 * torch.randn(noise.shape, generator=generator))
    assert white["mse_mean"] == pytest.approx(white["mse"], rel=0.1)
    # A colour that is off by a hundredth in one channel.
    off = measured(noise + torch.tensor([0.01, 0, 0])[:, None, None])
    assert off["mse_mean"] == pytest.approx(256 * 0.01**2 / 3, rel=1e-3) and off["mse"] < 4e-5


def test_the_error_of_the_mean_is_not_trained():
    d, output, x, x_t, t, noise = batch(1000, [3, 4])
    assert not training_losses(d, output.requires_grad_(), x, x_t, t, noise)["mse_mean"].requires_grad


def overfitted(norm_groups: int) -> float:
    """mse_mean at the largest quarter of t of a small net that has seen 8 flat pictures of 8 px 300 times each."""
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8, model_channels=32, norm_groups=8, channel_mult=[1], num_res_blocks=1, attention_resolutions=[8],
        num_head_channels=32, encoder_dim=16, encoder_channels=32, att_pool_heads=2,
    )  # fmt: skip
    config.norm_groups = norm_groups  # set beside the check that refuses one channel a group
    net, d = UNet(config), Diffusion(1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    x = torch.rand(8, 3, 1, 1).mul(2).sub(1).expand(8, 3, 8, 8)
    text, found = torch.randn(8, 4, 16), []
    for _ in range(300):
        t, noise = torch.randint(750, 1000, (8,)), torch.randn(x.shape)
        x_t = d.q_sample(x, t, noise)
        losses = training_losses(d, net(x_t, t, text), x, x_t, t, noise)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        found.append(float(losses["mse_mean"].mean()))
    return sum(found[-100:]) / 100


@pytest.mark.slow
def test_it_tells_a_net_whose_last_norm_erases_colours_from_one_that_sees_them():
    blind, seeing = overfitted(32), overfitted(8)
    assert seeing < 0.3 < 0.6 < blind, (seeing, blind)


def test_a_sample_s_loss_is_its_own_and_fp32_in_bf16():
    d, output, x, x_t, t, noise = batch(1000, [0, 7, 600])
    whole = training_losses(d, output, x, x_t, t, noise)
    for i in range(3):
        part = slice(i, i + 1)
        alone = training_losses(d, output[part], x[part], x_t[part], t[part], noise[part])
        for name, value in whole.items():
            torch.testing.assert_close(alone[name], value[part])
    half = training_losses(d, output.bfloat16(), x, x_t, t, noise)
    assert {v.dtype for v in half.values()} == {torch.float32}
    exact = training_losses(d, output.bfloat16().float(), x, x_t, t, noise)
    assert all(torch.equal(half[name], exact[name]) for name in exact)


def test_gradients_stay_finite_for_outputs_far_off():
    d, output, x, x_t, t, noise = batch(1000, [0, 1, 999])
    wild = (output * 20).requires_grad_()
    training_losses(d, wild, x, x_t, t, noise)["loss"].sum().backward()
    assert wild.grad.isfinite().all()


def test_unfit_channels_are_named():
    d, output, x, x_t, t, noise = batch(1000, [3])
    with pytest.raises(ValueError, match="3 channels for images of 2"):
        training_losses(d, output[:, :3], x, x_t, t, noise)
