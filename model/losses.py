"""The training loss: the noise's squared error and, for a learned variance, the rescaled variational term."""

import math

import torch
from torch import Tensor

from model.diffusion import Diffusion, Gaussian, split_output


def training_losses(
    diffusion: Diffusion, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Per-sample losses, fp32 [N] whatever the inputs' dtype: 'loss', 'mse', 'mse_mean' and, for 2C channels, 'vb'.

    mse: mean square of the error in the noise.
    mse_mean: the part of it that is the same all over the picture, an error in the mean colour. It is only 1/(H W) of
    mse, so it is given H x W times as large: 1, as mse, if nothing is predicted, and mse itself where the error is
    white. It is measured, not trained.
    vb: bits per dimension x timesteps / 1000; it trains only the variance, because the mean is detached in it.
    loss: mse + vb.
    Raises: ValueError for model outputs of neither C nor 2C channels.
    Source: Nichol & Dhariwal 2021, section 3.1; improved-diffusion's RESCALED_MSE.
    """
    model_output = model_output.float()
    eps, model_var_values = split_output(model_output, x_start.shape[1])
    error = (eps - noise.float()).flatten(2)
    mse = error.square().mean((1, 2))
    mse_mean = error.detach().mean(2).square().mean(1) * error.shape[2]
    if model_var_values is None:
        return {"loss": mse, "mse": mse, "mse_mean": mse_mean}
    frozen_mean = torch.cat([eps.detach(), model_var_values], dim=1)
    vb = vb_terms(diffusion, frozen_mean, x_start, x_t, t) * (diffusion.timesteps / 1000)
    return {"loss": mse + vb, "mse": mse, "mse_mean": mse_mean, "vb": vb}


def vb_terms(diffusion: Diffusion, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The bound's term of each sample's t, in bits per dimension [N]: a KL, or at t = 0 the data's NLL.

    x_start: [N, C, H, W] in [-1, 1], multiples of 2/255 from -1 on at t = 0.
    Source: Ho et al. 2020, equation 5.
    """
    x_start = x_start.float()
    true = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    pred = diffusion.p_mean_variance(x_t, t, model_output)
    kl = gaussian_kl(true, pred).flatten(1).mean(1)
    nll = discretized_gaussian_nll(x_start, pred).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of each element, in nats."""
    gap = p.log_variance - q.log_variance
    return 0.5 * (torch.expm1(gap) - gap + (p.mean - q.mean).square() * torch.exp(-q.log_variance))


def discretized_gaussian_nll(x: Tensor, q: Gaussian) -> Tensor:
    """-log of the mass that q gives to the 8-bit level of each element of x, in nats, at most 27.7.

    x: in [-1, 1]. The lowest and the highest level take the whole tail beyond them.
    Source: Ho et al. 2020, equation 13.
    """
    inv_std = torch.exp(-0.5 * q.log_variance)
    distance = x - q.mean
    # Measured on the lower side, by symmetry: there fp32 keeps the small differences between two CDFs.
    middle = _normal_cdf((1 / 255 - distance.abs()) * inv_std) - _normal_cdf((-1 / 255 - distance.abs()) * inv_std)
    lowest = _normal_cdf((distance + 1 / 255) * inv_std)
    highest = _normal_cdf((1 / 255 - distance) * inv_std)
    mass = torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, middle))
    return -torch.log(mass.clamp(min=1e-12))


def _normal_cdf(z: Tensor) -> Tensor:
    """The standard normal's distribution function. torch.special.ndtr is exactly 0 in fp32 from z = -5.5 down."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))
