"""From text to small images, and from those to large ones: the stages that train.sample draws through."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from model.super_resolution import AUG_LEVEL
from train.checkpoint.checkpoint import Checkpoint
from train.sampling.prompts import Prompts
from train.sampling.sampler import SamplingStep, make_scheduler, sample_batches, set_steps
from train.weights.pretrained import net_weights
from train.weights.trained_net import load_net

# What makes the text states of two trainings the same but for rounding.
SAME_TEXT = ("weights_sha256", "tokenizer_sha256", "tokens", "dim", "cleaning")


class Stage(NamedTuple):
    """A checkpoint, and how its net is sampled.

    name: of the scheduler.  aug_level: how much the second stage noises the small images.
    """

    checkpoint: Checkpoint
    scheduler: SchedulerMixin
    guidance_scale: float
    steps: str
    name: str = "ddpm"
    aug_level: float = AUG_LEVEL

    def title(self, weights: str) -> str:
        """How the images were drawn, on one line."""
        net = f"step {self.checkpoint.step:,}, {self.checkpoint.title(weights)}"
        aug_level = f", aug_level {self.aug_level:g}" if self.checkpoint.model.low_res_size else ""
        return f"{net}, {self.name} {self.steps} steps, guidance {self.guidance_scale:g}{aug_level}"

    def record(self) -> dict:
        """What sample.json says of the stage."""
        return {
            "checkpoint": self.checkpoint.folder.name, "step": self.checkpoint.step,
            "run_dir": self.checkpoint.config["run_dir"], "guidance_scale": self.guidance_scale, "steps": self.steps,
            "scheduler": self.name,
        }  # fmt: skip


def first_stage(checkpoint: Checkpoint, guidance_scale: float, steps: str, scheduler: str) -> Stage:
    """The stage that draws from text alone.

    Raises: ValueError if the net needs small images, or these steps cannot be taken.
    """
    if checkpoint.model.low_res_size:
        raise ValueError(
            f"checkpoint='{checkpoint.folder}' is of the second stage, which enlarges the images of a first one: give "
            "a checkpoint of the first stage as checkpoint=, and this one as second="
        )
    made = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma, scheduler)
    set_steps(made, steps)
    return Stage(checkpoint, made, guidance_scale, steps, scheduler)


def second_stage(
    checkpoint: Checkpoint, first: Checkpoint, guidance_scale: float, steps: str, aug_level: float
) -> Stage:
    """The stage that enlarges what the first one draws, by DDPM.

    Raises: ValueError if the two do not fit, these steps cannot be taken, or the net of a LoRA is not there.
    """
    size, text = first.model.image_size, first.text
    pair = f"second='{checkpoint.folder}'", f"checkpoint='{first.folder}'"
    if not checkpoint.model.low_res_size:
        raise ValueError(
            f"{pair[0]} is of the first stage: give a checkpoint of the second, such as one of +experiment=if_ii_l"
        )
    if checkpoint.model.low_res_size != size:
        raise ValueError(
            f"{pair[0]} enlarges images of {checkpoint.model.low_res_size} px, {pair[1]} draws {size} px: give a "
            f"second stage that was trained with model.low_res_size={size}"
        )
    if other := [name for name in SAME_TEXT if getattr(checkpoint.text, name) != getattr(text, name)]:
        raise ValueError(
            f"{pair[0]} was trained on text states of another {', '.join(other)} than {pair[1]}, and one encoding of a "
            "prompt serves both: give two that were trained on embeddings of the same kind"
        )
    made = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma, second_stage=True)
    try:
        set_steps(made, steps)
    except ValueError as error:
        raise ValueError(f"second_{error}") from None  # it begins with the name of the key
    if checkpoint.config["lora"]["rank"]:
        net_weights(checkpoint)  # what its LoRA was trained on may be gone, or changed
    return Stage(checkpoint, made, guidance_scale, steps, aug_level=aug_level)


def draw_stages(
    stages: Sequence[Stage], weights: str, device: torch.device, prompts: Prompts, seeds: Sequence[int],
    micro_batch: int, out: str, watch: Sequence[Callable[[SamplingStep], object]],
) -> Iterator[Tensor]:  # fmt: skip
    """Of each stage the images of all prompts, [P x n, 3, H, W] in [-1, 1], made of those of the stage before.

    What goes on from stage to stage is the floats, not their 256 levels, as in IF's own code and in diffusers, from
    IFPipeline with output_type="pt" to IFSuperResolutionPipeline. An image has the same seed in each stage, there too.
    One net is loaded at a time.
    weights: 'ema' or 'master'.  out, watch: as for sample_batches, one watch for each stage.
    Raises: ValueError if the weights cannot be loaded.
    """
    x_start = None
    for stage, of_stage in zip(stages, watch, strict=True):
        unet = load_net(stage.checkpoint, weights, device)
        x_start = sample_batches(
            unet, stage.scheduler, prompts.text_emb, prompts.empty, stage.guidance_scale, stage.steps, seeds,
            micro_batch, out, of_stage, x_start, stage.aug_level,
        )  # fmt: skip
        del unet  # before the next one is loaded
        yield x_start
