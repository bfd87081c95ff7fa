"""The forward process with cosine betas, its posterior, and the model's estimate of that posterior."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """mean and log_variance, both [N, C, H, W] or broadcastable to it."""

    mean: Tensor
    log_variance: Tensor


def cosine_betas(timesteps: int, max_beta: float = 0.999) -> Tensor:
    """float64 betas [timesteps] that make the signal's share alpha_bar fall as a squared cosine.

    Source: Nichol & Dhariwal 2021, equation 17, with s = 0.008.
    """
    edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


class Diffusion:
    """The diffusion process of `timesteps` steps; t runs from 0 to timesteps - 1.

    The coefficients are computed in float64 and kept as float32 tensors [timesteps]; everything here is float32.
    x_start, x_t, noise: [N, C, H, W]; t: integers [N].
    Source: Ho et al. 2020; Nichol & Dhariwal 2021.
    """

    def __init__(self, timesteps: int = 1000) -> None:
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps}: a diffusion needs at least 2")
        self.timesteps = timesteps
        betas = cosine_betas(timesteps)
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)

        self.betas = betas.float()
        self.log_betas = betas.log().float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt().float()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt().float()
        self.sqrt_recip_alphas_cumprod = alphas_cumprod.rsqrt().float()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt().float()
        self.posterior_variance = posterior_variance.float()
        # The posterior at t = 0 is a point, with a variance of 0; its logarithm is replaced by that of t = 1.
        clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        self.posterior_log_variance_clipped = clipped.log().float()
        self.posterior_mean_coef1 = (betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)).float()
        self.posterior_mean_coef2 = ((1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod)).float()

    def to(self, device: torch.device | str) -> "Diffusion":
        """Move the coefficients to a device; returns self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t drawn from q(x_t | x_start) with the given standard normal noise."""
        x_start, noise = x_start.float(), noise.float()
        return _at(self.sqrt_alphas_cumprod, t) * x_start + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_start), its log variance clipped at t = 0."""
        mean = _at(self.posterior_mean_coef1, t) * x_start.float() + _at(self.posterior_mean_coef2, t) * x_t.float()
        return Gaussian(mean, _at(self.posterior_log_variance_clipped, t))

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_start that this x_t and this noise imply."""
        x_t, eps = x_t.float(), eps.float()
        return _at(self.sqrt_recip_alphas_cumprod, t) * x_t - _at(self.sqrt_recipm1_alphas_cumprod, t) * eps

    def p_mean_variance(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Gaussian:
        """p(x_{t-1} | x_t) according to the model's output.

        model_output: [N, C, H, W], eps alone, and the variance is the posterior's; or [N, 2C, H, W], eps and
        model_var_values, where -1 means the posterior's log variance and 1 that of beta.
        Raises: ValueError for another number of channels.
        """
        eps, model_var_values = split_output(model_output.float(), x_t.shape[1])
        pred_xstart = self.predict_xstart_from_eps(x_t, t, eps)
        mean, log_variance = self.q_posterior_mean_variance(pred_xstart, x_t, t)
        if model_var_values is not None:
            log_variance = torch.lerp(log_variance, _at(self.log_betas, t), (model_var_values + 1) / 2)
        return Gaussian(mean, log_variance)


def split_output(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """eps and, where the output has twice the channels, model_var_values.

    Raises: ValueError for another number of channels.
    """
    if model_output.shape[1] == channels:
        return model_output, None
    if model_output.shape[1] == 2 * channels:
        eps, model_var_values = model_output.chunk(2, dim=1)
        return eps, model_var_values
    raise ValueError(
        f"model_output has {model_output.shape[1]} channels for images of {channels}: must be {channels} (eps) or "
        f"{2 * channels} (eps and variance)"
    )


def _at(coefficients: Tensor, t: Tensor) -> Tensor:
    """[timesteps], [N] -> [N, 1, 1, 1]"""
    return coefficients[t][:, None, None, None]
