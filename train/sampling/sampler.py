"""Text embeddings to images: classifier-free guidance with a scheduler of diffusers. The command is train.sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.pipelines.deepfloyd_if import timesteps as if_timesteps
from torch import Tensor

from data.checks import check_choice, count, did_you_mean
from data.progress import Progress
from model.diffusion import Diffusion
from model.super_resolution import AUG_LEVEL, augment_at
from model.unet import TextState, UNet

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
# The timesteps that IF's authors chose out of the 1000, under their names: fast27, smart50, ...
PRESETS: dict[str, list[int]] = {
    name.removesuffix("_timesteps"): values
    for name, values in vars(if_timesteps).items()
    if name.endswith("_timesteps")
}
PRESET_TIMESTEPS = 1000
# IF's authors take the last step out of fast27 and put the third last in; diffusers' list begins with the last.
PRESETS["fast27"] = [PRESET_TIMESTEPS - 3, *PRESETS["fast27"][1:]]


def make_scheduler(timesteps: int, learn_sigma: bool, name: str = "ddpm", second_stage: bool = False) -> SchedulerMixin:
    """A scheduler with cosine betas and dynamic thresholding, as IF was released with.

    The threshold is the quantile 0.95, and at most 1.5, in the second stage 1.
    name: 'ddpm', the only one that uses a learned variance; 'ddim' (eta 0); 'dpm++' (DPM-Solver++, second order,
    multistep).
    Raises: ValueError for another name.
    """
    check_choice("scheduler", name, SCHEDULERS)
    config = {
        "num_train_timesteps": timesteps, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
        "thresholding": True, "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.0 if second_stage else 1.5,
        # The other schedulers ignore it, but IFPipeline reads it from their config and then drops the variance.
        "variance_type": "learned_range" if learn_sigma and name == "ddpm" else "fixed_small",
    }  # fmt: skip
    if name == "dpm++":
        # Below this log-SNR the cosine schedule has hardly any signal, and the solver's steps grow without bound.
        config["lambda_min_clipped"] = -5.1
    # From the last timestep to the first, as IF's authors space them. diffusers' default, "leading", starts too late
    # where the number of steps does not divide that of the timesteps: 600 steps of 1000 would be the first 600.
    config["timestep_spacing"] = "trailing" if name == "ddim" else "linspace"
    return SCHEDULERS[name].from_config(config)


def set_steps(scheduler: SchedulerMixin, steps: int | str) -> None:
    """Choose the timesteps to sample at: a number of evenly spaced ones, or one of IF's presets by name.

    Raises: ValueError if the scheduler cannot take these steps.
    """
    trained = scheduler.config.num_train_timesteps
    if isinstance(steps, str) and not steps.isdecimal():
        if steps not in PRESETS:
            raise ValueError(
                f"steps={steps} must be a number or one of {', '.join(PRESETS)}{did_you_mean(steps, PRESETS)}"
            )
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
            f"steps={steps}: diffusers' DDIM is exact only for divisors of the {trained} diffusion steps: "
            f"steps={near} is the nearest"
        )
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps.unique()) < steps:
        raise ValueError(f"steps={steps} are more than {type(scheduler).__name__} can tell apart: take fewer")


class SamplingStep(NamedTuple):
    """A step of the sampler at timestep t: from x_t to x_next, and the picture that x_t is taken to come from.

    Shapes: x_t, pred_xstart, x_next [N, 3, H, W]; pred_xstart is within [-1, 1], thresholded.
    """

    t: int
    x_t: Tensor
    pred_xstart: Tensor
    x_next: Tensor


@torch.no_grad()
def denoise(
    unet: UNet, scheduler: SchedulerMixin, text_emb: Tensor | TextState, empty: Tensor, guidance_scale: float,
    steps: int | str, seeds: Sequence[int], low_res: Tensor | None = None, aug_level: float = AUG_LEVEL,
) -> Iterator[SamplingStep]:  # fmt: skip
    """The steps of `sample`, with its arguments, from pure noise to the images."""
    config, n, device = unet.config, len(seeds), next(unet.parameters()).device
    shape = (config.in_channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    if (given := 0 if low_res is None else low_res.shape[-1]) != config.low_res_size:
        raise ValueError(f"low_res is of {given} px, and the net's model.low_res_size is {config.low_res_size}")
    x_t = noise()
    augmented: tuple[Tensor, ...] = ()
    if low_res is not None:
        diffusion = Diffusion(scheduler.config.num_train_timesteps).to(device)
        augmented = augment_at(diffusion, low_res.to(device), aug_level, noise())
    text = text_emb if isinstance(text_emb, TextState) else unet.encode_text(text_emb.to(device))
    if guided := guidance_scale != 1:
        unguided = unet.encode_text(empty[None].to(device))
        text = TextState(*(torch.cat([a, b.expand_as(a)]) for a, b in zip(text, unguided, strict=True)))
        augmented = tuple(torch.cat([value, value]) for value in augmented)
    learned = scheduler.config.variance_type == "learned_range"
    # A CPU's forward convolutions are faster in channels_last; on a GPU the norms would undo the layout.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    set_steps(scheduler, steps)
    for t in scheduler.timesteps.tolist():
        x = (torch.cat([x_t, x_t]) if guided else x_t).to(memory_format=layout)
        output = unet(x, torch.full((len(x),), t, device=device), text, *augmented).float()
        eps, variance = output[:, : config.in_channels], output[:n, config.in_channels :]
        if guided:
            eps = eps[n:] + guidance_scale * (eps[:n] - eps[n:])
        model_output = torch.cat([eps, variance], dim=1) if learned else eps
        stepped = scheduler.step(model_output, t, x_t, generator=generators)
        # The multistep solver keeps it as the latest of its predictions.
        pred_xstart = stepped.get("pred_original_sample", None)
        yield SamplingStep(
            t, x_t, scheduler.model_outputs[-1] if pred_xstart is None else pred_xstart, stepped.prev_sample
        )
        x_t = stepped.prev_sample


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] as uint8 on the CPU; what lies beyond is clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# A compiled net would be compiled again for these shapes, which takes longer than the sampling.
@torch.compiler.set_stance("force_eager")
def sample(
    unet: UNet, scheduler: SchedulerMixin, text_emb: Tensor | TextState, empty: Tensor, guidance_scale: float,
    steps: int | str, seeds: Sequence[int], after_step: Callable[[SamplingStep], object] = lambda step: None,
    low_res: Tensor | None = None, aug_level: float = AUG_LEVEL,
) -> Tensor:  # fmt: skip
    """Sample one image per caption and seed: [N, 3, H, W] uint8 on the CPU.

    Each image has a generator of its own, so it does not depend, beyond rounding, on the others in its batch.
    Shapes: text_emb [N, L, D], or unet.encode_text of it; empty [L, D], the embedding of the empty caption.
    guidance_scale: 1 samples as trained, more exaggerates the prompt.
    after_step: called with each step.
    low_res: for a net of the second stage, what it enlarges, [N, 3, h, w] in [-1, 1].
    aug_level: how much that is noised first, as a share of the timesteps, in [0, 1).
    Raises: ValueError, as set_steps, or if low_res is not of the net's low_res_size.
    Source: Ho & Salimans 2022, equation 6, where guidance_scale is 1 + w.
    """
    for step in denoise(unet, scheduler, text_emb, empty, guidance_scale, steps, seeds, low_res, aug_level):
        images = step.x_next
        after_step(step)
    return to_pixels(images)


def sample_batches(
    unet: UNet, scheduler: SchedulerMixin, text_emb: Tensor, empty: Tensor, guidance_scale: float, steps: int | str,
    seeds: Sequence[int], micro_batch: int, out: str = "", watch: Callable[[SamplingStep], object] = lambda step: None,
    low_res: Tensor | None = None, aug_level: float = AUG_LEVEL,
) -> Tensor:  # fmt: skip
    """As sample, `micro_batch` images at a time, and tells the steps of all images; consecutive seeds share a prompt.

    Returns [P x n, 3, H, W] float32 in [-1, 1] on the CPU: what the second stage takes; to_pixels makes pixels of it.
    out: where the images will be, to tell it.
    Shapes: text_emb [P, L, D], empty [L, D], seeds P x n, of which the first n are for the first prompt; low_res
    [P x n, 3, h, w] as for sample, one for each image.
    watch: called with each step of the first batch.
    """
    with torch.no_grad():
        of_prompts = unet.encode_text(text_emb.to(next(unet.parameters()).device))
    text = TextState(*(value.repeat_interleave(len(seeds) // len(text_emb), 0) for value in of_prompts))
    images: list[Tensor] = []
    set_steps(scheduler, steps)

    def after(step: SamplingStep) -> None:
        progress.update(len(step.x_t))
        if not images:
            watch(step)

    noun = "image" if low_res is None else "large image"
    with Progress(count(len(seeds), noun), len(seeds) * len(scheduler.timesteps), "step", out) as progress:
        for start in range(0, len(seeds), micro_batch):
            part = slice(start, start + micro_batch)
            batch = TextState(*(value[part] for value in text))
            small = None if low_res is None else low_res[part]
            for step in denoise(unet, scheduler, batch, empty, guidance_scale, steps, seeds[part], small, aug_level):
                after(step)
            images.append(step.x_next.cpu())  # where the last step ends: at its pred_xstart
    return torch.cat(images)
