"""Text embeddings to images, through diffusers' DDPM scheduler with guidance."""

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from model.unet import UNet


def make_scheduler(timesteps: int, learn_sigma: bool) -> DDPMScheduler:
    """The released model's scheduler: cosine betas, dynamic thresholding at 0.95, at most 1.5."""
    return DDPMScheduler(
        num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon",
        variance_type="learned_range" if learn_sigma else "fixed_small",
        thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
    )  # fmt: skip


# A compiled net would be compiled anew for these shapes, longer than the sampling takes.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def sample(
    unet: UNet, scheduler: DDPMScheduler, text_emb: Tensor, empty: Tensor, guidance_scale: float, steps: int, seed: int
) -> Tensor:
    """One image a prompt: [N, 3, H, W] uint8 on the CPU, each drawn from its own generator.

    Shapes: text_emb [N, L, D]; empty [L, D], the embedding of the empty caption.
    guidance_scale: 1 follows the prompt as trained, above it exaggerates (Ho & Salimans 2022, with their 1 + w).
    """
    config, n, device = unet.config, len(text_emb), next(unet.parameters()).device
    shape = (config.in_channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(n)]
    x_t = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    text = unet.encode_text(torch.cat([text_emb, empty.expand_as(text_emb)]).to(device))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        timesteps = torch.full((2 * n,), t, device=device)
        output = unet(torch.cat([x_t, x_t]), timesteps, text).float()
        eps, variance = output[:, : config.in_channels], output[:n, config.in_channels :]
        guided = eps[n:] + guidance_scale * (eps[:n] - eps[n:])
        x_t = scheduler.step(torch.cat([guided, variance], dim=1), t, x_t, generator=generators).prev_sample
    return ((x_t.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
