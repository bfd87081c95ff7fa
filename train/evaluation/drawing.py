"""The pictures that a net draws for the captions of an evaluation."""

import numpy as np
import torch
from diffusers import SchedulerMixin

from model.unet import UNet
from train.evaluation.eval_set import EvalSet
from train.sampling.sampler import sample

# Evaluations with different seeds share no picture's seed as long as they have fewer pictures than this.
SEED_STRIDE = 1_000_003


def draw(
    unet: UNet, scheduler: SchedulerMixin, steps: str, eval_set: EvalSet, seed: int, scale: float, first: int, stop: int
) -> np.ndarray:
    """Draw pictures for the prompts from first to stop, each with a seed of its own; uint8 [n, 3, H, W].

    seed: of the evaluation.  scale: of the guidance.
    """
    text_emb, empty = torch.from_numpy(eval_set.embeddings(first, stop)), torch.from_numpy(eval_set.empty.copy())
    seeds = [seed * SEED_STRIDE + i for i in range(first, stop)]
    return sample(unet, scheduler, text_emb, empty, scale, steps, seeds).numpy()
