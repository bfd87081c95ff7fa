"""The validation loss: the training's loss on held-out samples, at fixed timesteps with fixed noise."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader.batch import Batch
from data.loader.draws import Draw, generator
from data.loader.held_out import HeldOut
from model.diffusion import Diffusion
from model.losses import training_losses
from model.super_resolution import AUG_LEVEL, augment_at
from model.unet import UNet
from train.config import Config
from train.faults.limits import FIRST
from train.faults.preempt import RankConsensus, stop_requested
from train.faults.watchdog import Watchdog
from train.inputs import Inputs

if TYPE_CHECKING:  # the engine takes seconds to import, and the plans have no need of it
    from train.ema import EMA
    from train.engine import Engine

logger = logging.getLogger(__name__)

TIMESTEPS = 8
# The noise is the same in every run, whatever its seed, so that it does not tell two runs apart.
SEED = 0


class Validation:
    """Validates a training every `validate_every` steps and at its end."""

    def __init__(
        self, config: Config, inputs: Inputs, diffusion: Diffusion, device: torch.device, consensus: RankConsensus,
        watchdog: Watchdog,
    ) -> None:  # fmt: skip
        self._config, self._inputs, self._diffusion, self._device = config, inputs, diffusion, device
        self._consensus, self._watchdog, self._limit = consensus, watchdog, float(FIRST)
        self._held_out: HeldOut | None = None
        if config.validate_every:
            self._held_out = HeldOut(
                config.data, inputs.held_out, inputs.meta, image_size=config.model.image_size,
                samples=config.data.validation.samples, micro_batch=config.micro_batch, rank=dist.get_rank(),
                ranks=dist.get_world_size(), low_res_size=config.model.low_res_size,
            )  # fmt: skip

    def at(self, step: int, engine: "Engine", ema: "EMA") -> dict[str, float]:
        """The validation losses of the average if they are due at a step, else {}; a collective call.

        It is broken off if a rank is asked to stop; the result then is {} too.
        """
        if not self._held_out or (step % self._config.validate_every and step != self._config.steps):
            return {}
        self._watchdog.reset(self._limit)  # the net may be compiled for it
        self._limit = 1.0
        text_emb = self._inputs.text_emb
        with ema.in_place_of_weights(engine):
            values = validation_losses(
                engine.model, self._diffusion, self._held_out, text_emb, self._device, self._stop
            )
        if not values and dist.get_rank() == 0:
            logger.warning("the validation of step %d is broken off, to stop", step)
        return values

    def _stop(self) -> bool:
        self._watchdog.reset()
        return self._consensus.ask(stop_requested())()[0]


def timesteps(total: int) -> list[int]:
    """The middles of 8 equal parts of [0, T), t_i = (2 i + 1) T / 16 rounded down.  total: T."""
    return [(2 * i + 1) * total // (2 * TIMESTEPS) for i in range(TIMESTEPS)]


@torch.no_grad()
def validation_losses(
    unet: UNet, diffusion: Diffusion, held_out: HeldOut, text_emb: Callable[[Tensor], Tensor], device: torch.device,
    stop: Callable[[], bool] = lambda: False, aug_level: float = AUG_LEVEL,
) -> dict[str, float]:  # fmt: skip
    """Means over the samples of all ranks and the timesteps, as validation/NAME; a collective call.

    Every loss of training_losses is one, and validation/mse_e0 ... mse_e7 are the squared errors at each timestep. Of
    no sample that can be read there are none.
    text_emb: [N, L, D] of a batch's text_emb.  stop: asked after each forward; if it is true, the result is {}.
    aug_level: of the small images of the second stage, by default as where images are drawn.
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in held_out:
        x_start, weight = batch.pixels.to(device).float() / 127.5 - 1.0, batch.weight.to(device).double()
        text = unet.encode_text(text_emb(batch.text_emb.to(device)))
        low_res = augmented(batch, diffusion, device, aug_level)
        for i, timestep in enumerate(timesteps(diffusion.timesteps)):
            noise = draw_noise(batch.visit, i, tuple(x_start.shape[1:])).to(device)
            t = torch.full((len(x_start),), timestep, device=device)
            x_t = diffusion.q_sample(x_start, t, noise)
            losses = training_losses(diffusion, unet(x_t, t, text, *low_res), x_start, x_t, t, noise)
            for name, value in losses.items():
                of_timesteps = sums.setdefault(name, torch.zeros(TIMESTEPS, dtype=torch.float64, device=device))
                of_timesteps[i] += (value.double() * weight).sum()
            if stop():
                return {}
        counts += torch.stack([weight.sum(), weight.new_tensor(len(batch.bad))])
    packed = torch.cat([counts, *sums.values()])
    dist.all_reduce(packed)
    (good, bad), *found = packed.cpu().split([2, *(TIMESTEPS for _ in sums)])
    values = {"validation/bad_samples": float(bad)}
    if good:
        means = {name: value / good for name, value in zip(sums, found, strict=True)}
        values |= {f"validation/{name}": float(value.mean()) for name, value in means.items()}
        values |= {f"validation/mse_e{i}": float(value) for i, value in enumerate(means["mse"])}
    return values


def augmented(batch: Batch, diffusion: Diffusion, device: torch.device, level: float) -> tuple[Tensor, ...]:
    """low_res and aug_t as the net of the second stage takes them, the same at every call; () in the first stage."""
    if batch.low_res is None:
        return ()
    noise = draw_noise(batch.visit, TIMESTEPS, tuple(batch.pixels.shape[1:])).to(device)  # none of the timesteps'
    return augment_at(diffusion, batch.low_res.to(device).float() / 127.5 - 1.0, level, noise)


def draw_noise(visit: Tensor, i: int, shape: tuple[int, ...]) -> Tensor:
    """The noise [N, *shape] of samples at the i-th timestep, drawn by each one's visit; zeros where that is -1."""
    noise = torch.zeros((len(visit), *shape))
    for out, v in zip(noise.numpy(), visit.tolist(), strict=True):
        if v >= 0:
            generator(SEED, Draw.VALIDATION_NOISE, v, i).standard_normal(dtype=np.float32, out=out)
    return noise
