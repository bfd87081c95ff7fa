import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from model.diffusion import Diffusion, cosine_betas

BOTH = pytest.mark.parametrize("timesteps", [1000, 50])


def scheduler(timesteps: int, variance_type: str = "learned_range") -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=timesteps,
        beta_schedule="squaredcos_cap_v2",
        variance_type=variance_type,
        clip_sample=False,
    )


def some_t(timesteps: int) -> Tensor:
    return torch.tensor([0, 1, 2, timesteps // 3, timesteps // 2, timesteps - 2, timesteps - 1])


def images(n: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def assert_near(a: Tensor, b: Tensor, rel: float = 1e-5) -> None:
    """Within rel of the largest value of each sample."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    assert ((a - b).abs().amax(1) <= rel * b.abs().amax(1)).all(), ((a - b).abs().amax(1) / b.abs().amax(1)).tolist()


@BOTH
def test_betas_follow_the_squared_cosine(timesteps):
    def alpha_bar(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t + 1) / alpha_bar(t), 0.999) for t in range(timesteps)]
    betas = cosine_betas(timesteps)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert betas[-1] == 0.999
    d = Diffusion(timesteps)
    torch.testing.assert_close(d.betas, scheduler(timesteps).betas, rtol=1e-6, atol=0)
    # Before the last beta is capped, the product telescopes to the closed form.
    closed = torch.tensor([alpha_bar(t + 1) / alpha_bar(0) for t in range(timesteps - 1)])
    torch.testing.assert_close(d.alphas_cumprod[:-1], closed, rtol=1e-6, atol=0)


@BOTH
def test_q_sample_is_the_closed_form_and_the_scheduler_s(timesteps):
    t = some_t(timesteps)
    x, noise = images(len(t)), images(len(t), seed=1)
    d = Diffusion(timesteps)
    x_t = d.q_sample(x, t, noise)
    share = (1 - cosine_betas(timesteps)).cumprod(0)[t][:, None, None, None]
    assert_near(x_t, share.sqrt() * x + (1 - share).sqrt() * noise, 1e-6)
    assert_near(x_t, scheduler(timesteps).add_noise(x, noise, t))


@BOTH
def test_posterior_is_bayes_rule(timesteps):
    """Against the product of the two float64 Gaussians q(x_{t-1} | x_0) and q(x_t | x_{t-1})."""
    t = some_t(timesteps)[1:]
    x, x_t = images(len(t)), images(len(t), seed=1)
    betas = cosine_betas(timesteps)
    bars = (1 - betas).cumprod(0)
    beta, bar_prev = betas[t][:, None, None, None], bars[t - 1][:, None, None, None]
    precision = 1 / (1 - bar_prev) + (1 - beta) / beta
    mean = (bar_prev.sqrt() * x / (1 - bar_prev) + (1 - beta).sqrt() * x_t / beta) / precision
    got = Diffusion(timesteps).q_posterior_mean_variance(x, x_t, t)
    assert_near(got.mean, mean, 1e-6)
    torch.testing.assert_close(got.log_variance.double(), -precision.log(), rtol=1e-6, atol=1e-6)
    at_zero = Diffusion(timesteps).q_posterior_mean_variance(x[:1], x_t[:1], torch.tensor([0]))
    at_one = Diffusion(timesteps).q_posterior_mean_variance(x[:1], x_t[:1], torch.tensor([1]))
    assert torch.equal(at_zero.log_variance, at_one.log_variance)
    torch.testing.assert_close(at_zero.mean, x[:1])


@BOTH
def test_predict_xstart_undoes_q_sample(timesteps):
    t = some_t(timesteps)[:-1]
    x, noise = images(len(t)), images(len(t), seed=1)
    d = Diffusion(timesteps)
    x_t = d.q_sample(x, t, noise)
    error = (d.predict_xstart_from_eps(x_t, t, noise) - x).abs().amax(dim=(1, 2, 3))
    assert (error <= 1e-6 * d.sqrt_recip_alphas_cumprod[t] + 1e-6).all()


@pytest.mark.parametrize("channels", [3, 6])
@BOTH
def test_p_mean_variance_is_what_the_scheduler_samples_from(timesteps, channels):
    reference = scheduler(timesteps, "learned_range" if channels == 6 else "fixed_small_log")
    d = Diffusion(timesteps)
    for t in some_t(timesteps)[1:].tolist():
        x_t, output = images(1), images(1, channels, seed=1)
        p = d.p_mean_variance(x_t, torch.tensor([t]), output)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
        step = reference.step(output, t, x_t, generator=torch.Generator().manual_seed(2))
        assert_near(
            p.mean + torch.exp(0.5 * p.log_variance) * noise, step.prev_sample, 1e-3 if t == timesteps - 1 else 1e-4
        )


def test_variance_values_run_from_the_posterior_to_beta():
    d = Diffusion()
    x_t, t = images(2), torch.tensor([0, 400])
    for value, bound in ((-1.0, d.posterior_log_variance_clipped), (1.0, d.betas.log())):
        output = torch.cat([images(2), torch.full((2, 3, 4, 4), value)], dim=1)
        log_variance = d.p_mean_variance(x_t, t, output).log_variance
        torch.testing.assert_close(log_variance, bound[t][:, None, None, None].expand_as(x_t))


def test_works_in_fp32_for_bf16_inputs_and_moves():
    d = Diffusion(10)
    assert d.to("cpu") is d
    x = images(2).bfloat16()
    t = torch.tensor([0, 9])
    assert d.q_sample(x, t, x).dtype == torch.float32
    assert d.p_mean_variance(x, t, torch.cat([x, x], 1)).mean.dtype == torch.float32
    on_meta = Diffusion(10).to("meta")
    assert {v.device.type for v in vars(on_meta).values() if isinstance(v, Tensor)} == {"meta"}


def test_unfit_numbers_are_named():
    with pytest.raises(ValueError, match="timesteps=1"):
        Diffusion(1)
    with pytest.raises(ValueError, match="4 channels for images of 3"):
        Diffusion(10).p_mean_variance(images(1), torch.tensor([3]), images(1, 4))
