"""The exponential moving average (EMA) of the weights: fp32, each rank keeps its own part of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.engine import Engine
from train.weights.power_average import TRACKED, decay, gamma_of, last_update


class EMA:
    """average <- d x average + (1 - d) x weights after each step, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets a short run forget its random start; at decay 0.9999 it ends after 90,000
    steps. The average is fp32 and follows the fp32 master weights: in bf16 a decay of 0.9999 changes nothing, since its
    updates are smaller than the resolution of the format.
    tracked: also keep the two of train/weights/power_average.py, of which one of any length can be made after the run.
    averages: all of them, by their names in a checkpoint.
    """

    def __init__(self, engine: Engine, decay: float, tracked: bool = False) -> None:
        self.decay = decay
        self._gammas = {name: gamma_of(length) for name, length in TRACKED.items()} if tracked else {}
        self.averages: dict[str, Tensor] = {name: engine.master.detach().clone() for name in ("ema", *self._gammas)}
        self.average = self.averages["ema"]

    @torch.no_grad()
    def update(self, engine: Engine, step: int) -> None:
        """Average in the weights that a step has made; the first step is 1."""
        self.average.lerp_(engine.master, 1.0 - min(self.decay, (1 + step) / (10 + step)))
        for name, gamma in self._gammas.items():
            # By the steps that were made: a skipped one makes no weights.
            if last_update(made := engine.schedule_step) == made:
                self.averages[name].lerp_(engine.master, 1.0 - decay(gamma, made))

    @contextmanager
    def in_place_of_weights(self, engine: Engine) -> Iterator[None]:
        """Inside the block the model of every rank has the averaged weights; a collective call."""
        weights = engine.master.detach().clone()
        engine.master.data.copy_(self.average)
        engine.push_master()
        # Not in a finally: after an error of one rank the others are elsewhere, and the error would wait here for them.
        yield
        engine.master.data.copy_(weights)
        engine.push_master()
