"""The pictures that a net draws for the captions of an evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin

from model.unet import UNet
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import EvalSet
from train.monitor.plots import label_of
from train.sampling.sampler import sample

# Evaluations with different seeds share no picture's seed as long as they have fewer pictures than this.
SEED_STRIDE = 1_000_003

# Makes or reads the pictures from first to stop: (first, stop) -> uint8 [stop - first, 3, H, W].
Pieces = Callable[[int, int], np.ndarray]


class Drawing(NamedTuple):
    """Pictures of an evaluation, and the settings that tell them from the others.

    settings: guidance_scale, in the second stage with aug_level; or enlarged_by, without a net.
    """

    settings: dict[str, Any]
    images: ChunkedArray

    @property
    def name(self) -> str:
        return label_of(self.settings)


def find_drawings(out: Path, samples: int, settings: list[dict[str, Any]]) -> list[Drawing]:
    """A drawing of each of the settings, in a folder that is named by them."""
    names = [label_of(one).replace(",", "").replace(" ", "-") for one in settings]
    return [
        Drawing(one, ChunkedArray(out / name, "images", samples)) for one, name in zip(settings, names, strict=True)
    ]


def draw(
    unet: UNet, scheduler: SchedulerMixin, steps: str, eval_set: EvalSet, seed: int, settings: dict[str, Any],
    low_res: Pieces | None, first: int, stop: int,
) -> np.ndarray:  # fmt: skip
    """Draw pictures for the prompts from first to stop, each with a seed of its own; uint8 [n, 3, H, W].

    seed: of the evaluation.  settings: of a Drawing.  low_res: what a net of the second stage enlarges.
    """
    text_emb, empty = torch.from_numpy(eval_set.embeddings(first, stop)), torch.from_numpy(eval_set.empty.copy())
    seeds = [seed * SEED_STRIDE + i for i in range(first, stop)]
    small, level = None, 0.0
    if low_res is not None:
        small, level = torch.from_numpy(low_res(first, stop)).float() / 127.5 - 1, settings["aug_level"]
    return sample(
        unet, scheduler, text_emb, empty, settings["guidance_scale"], steps, seeds, low_res=small, aug_level=level
    ).numpy()
