"""Text embeddings to images: guidance around a scheduler of diffusers. The command is train.sample."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.pipelines.deepfloyd_if import timesteps as if_timesteps
from torch import Tensor

from model.unet import TextState, UNet

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
# IF's own respacings of its 1000 timesteps, by the names of its authors: fast27, smart50, ...
PRESETS: dict[str, list[int]] = {
    name.removesuffix("_timesteps"): values
    for name, values in vars(if_timesteps).items()
    if name.endswith("_timesteps")
}
PRESET_TIMESTEPS = 1000


def make_scheduler(timesteps: int, learn_sigma: bool, name: str = "ddpm") -> SchedulerMixin:
    """Cosine betas and dynamic thresholding at 0.95, at most 1.5, as released; 'ddpm' uses the learned variance.

    name: 'ddpm', 'ddim' (eta 0) or 'dpm++' (DPM-Solver++, second order, multistep).
    Raises: ValueError for another name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler={name} must be one of {', '.join(SCHEDULERS)}")
    config = {
        "num_train_timesteps": timesteps, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
        "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5,
        # Of the others only its place in the config counts: IFPipeline looks there, and throws the variance away.
        "variance_type": "learned_range" if learn_sigma and name == "ddpm" else "fixed_small",
    }  # fmt: skip
    if name == "dpm++":
        # Before this the cosine schedule has hardly any signal, and the solver's steps in log-SNR have no bound.
        config["lambda_min_clipped"] = -5.1
    # From the last timestep to the first, as IF's authors space them. diffusers' default, "leading", begins in the
    # middle where the number of steps is no divisor: of 1000 timesteps 600 steps would be the first 600.
    config["timestep_spacing"] = "trailing" if name == "ddim" else "linspace"
    return SCHEDULERS[name].from_config(config)


def set_steps(scheduler: SchedulerMixin, steps: int | str) -> None:
    """Choose the timesteps to sample at: their number, evenly spaced, or the name of one of IF's presets.

    Raises: ValueError for what the scheduler or its training does not have.
    """
    trained = scheduler.config.num_train_timesteps
    if isinstance(steps, str) and not steps.isdecimal():
        if steps not in PRESETS:
            raise ValueError(f"steps={steps} must be a number or one of {', '.join(PRESETS)}")
        if trained != PRESET_TIMESTEPS or not isinstance(scheduler, DDPMScheduler):
            raise ValueError(
                f"steps={steps} is made for ddpm and {PRESET_TIMESTEPS} diffusion steps, this is "
                f"{type(scheduler).__name__} with {trained}: give a number of steps"
            )
        scheduler.set_timesteps(timesteps=PRESETS[steps])
        return
    steps = int(steps)
    if not 2 <= steps <= trained:
        raise ValueError(f"steps={steps} must lie between 2 and the {trained} diffusion steps of the training")
    if isinstance(scheduler, DDIMScheduler) and trained % steps:
        near = min((n for n in range(2, trained + 1) if trained % n == 0), key=lambda n: abs(n - steps))
        raise ValueError(
            f"steps={steps}: diffusers' DDIM is exact for divisors of the {trained} diffusion steps alone: "
            f"steps={near} is the nearest"
        )
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps.unique()) < steps:
        raise ValueError(f"steps={steps} are more than {type(scheduler).__name__} can tell apart: take fewer")


# A compiled net would be compiled anew for these shapes, longer than the sampling takes.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def sample(
    unet: UNet, scheduler: SchedulerMixin, text_emb: Tensor | TextState, empty: Tensor, guidance_scale: float,
    steps: int | str, seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """One image a caption and seed: [N, 3, H, W] uint8 on the CPU, each drawn from a generator of its own.

    So an image doesn't depend, beyond rounding, on which others are drawn with it.
    Shapes: text_emb [N, L, D], or what unet.encode_text made of it; empty [L, D], the embedding of the empty caption.
    guidance_scale: 1 follows the prompt as trained, above it exaggerates (Ho & Salimans 2022, with their 1 + w).
    Raises: ValueError, as set_steps.
    """
    config, n, device = unet.config, len(seeds), next(unet.parameters()).device
    shape = (config.in_channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x_t = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    text = text_emb if isinstance(text_emb, TextState) else unet.encode_text(text_emb.to(device))
    if guided := guidance_scale != 1:
        unguided = unet.encode_text(empty[None].to(device))
        text = TextState(*(torch.cat([a, b.expand_as(a)]) for a, b in zip(text, unguided, strict=True)))
    learned = scheduler.config.variance_type == "learned_range"
    # A CPU's convolutions are faster so, though not its backward; on a GPU the norms turn the layout back.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    set_steps(scheduler, steps)
    for t in scheduler.timesteps.tolist():
        x = (torch.cat([x_t, x_t]) if guided else x_t).to(memory_format=layout)
        output = unet(x, torch.full((len(x),), t, device=device), text).float()
        eps, variance = output[:, : config.in_channels], output[:n, config.in_channels :]
        if guided:
            eps = eps[n:] + guidance_scale * (eps[:n] - eps[n:])
        model_output = torch.cat([eps, variance], dim=1) if learned else eps
        x_t = scheduler.step(model_output, t, x_t, generator=generators).prev_sample
    return ((x_t.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
