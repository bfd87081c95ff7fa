"""The moving average of the weights: fp32, on each rank's own part of the masters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.engine import Engine


class EMA:
    """average <- d x average + (1 - d) x masters after each step, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d at first lets a short run forget its random start; at 0.9999 it is over after 90,000 steps.
    In bf16 a decay of 0.9999 would not move: its steps lie below the format's resolution.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self.average: Tensor = engine.master.detach().clone()

    @torch.no_grad()
    def update(self, engine: Engine, step: int) -> None:
        """Take in the masters of the step just made, the first being step 1."""
        self.average.lerp_(engine.master, 1.0 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_place_of_weights(self, engine: Engine) -> Iterator[None]:
        """Within it the model of every rank has the averaged weights; a collective call."""
        kept = engine.master.detach().clone()
        engine.master.data.copy_(self.average)
        engine.push_master()
        try:
            yield
        finally:
            engine.master.data.copy_(kept)
            engine.push_master()
