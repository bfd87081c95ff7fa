"""The training: read this page first."""

import time
from pathlib import Path

import torch

from data.quarantine import Quarantine
from data.stream import MicroBatches, micro_batches
from model.diffusion import Diffusion
from model.losses import training_losses
from model.unet import UNet
from train.checkpoint import resume, save
from train.config import Config, accumulation
from train.ema import EMA
from train.engine import build_engine
from train.inputs import Inputs, begins_from_weights
from train.meters import Meters
from train.noise import draw_t_and_noise
from train.show import Show

# A share is judged over no fewer samples than this, so that a few bad ones in a small run do not end it.
MIN_SEEN = 500


class TooManyBad(RuntimeError):
    """So many samples could not be read that going on would train on something else."""

    def __init__(self, step: int, bad: float, seen: float, limit: float, reasons: dict[str, int]) -> None:
        super().__init__(
            f"step {step}: {bad:.0f} of the last {seen:.0f} samples could not be read "
            f"(here: {reasons}), more than data.max_bad_share={limit}: mend the shards, or raise the limit"
        )


def train(config: Config, inputs: Inputs, rank: int, ranks: int, device: torch.device) -> None:
    """Train to config.steps, going on from the latest checkpoint of config.run_dir.

    Raises: TooManyBad when more samples than data.max_bad_share cannot be read.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    inputs.to(device)
    with device:  # built where it will be: on the host, eight ranks of XL would take 138 GB
        unet = UNet(config.model)
    if config.compile:  # the forward alone, for DeepSpeed hangs hooks on the module that can't be traced
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    engine = build_engine(unet, config, ranks)
    if begins_from_weights(config):
        engine.set_weights(inputs.weights)
        inputs.weights = None
    ema = EMA(engine, config.ema_decay)
    diffusion = Diffusion(config.diffusion_steps).to(device)
    first_step = resume(run_dir, engine, ema)
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, config.model.image_size, config.seed, config.global_batch,
        config.micro_batch, rank, ranks, first_step,
    )  # fmt: skip
    batches = micro_batches(stream, config.data.workers, pin_memory=device.type == "cuda")
    meters, quarantine = Meters(device, config.diffusion_steps), Quarantine(run_dir, rank)
    show = Show(config, inputs, run_dir, first_step, device) if rank == 0 else None

    seen = bad = 0.0
    for step in range(first_step + 1, config.steps + 1):
        lr = engine.lr()
        for _ in range(accumulation(config, ranks)):
            waited = time.perf_counter()
            batch = next(batches)
            meters.add_data_wait(time.perf_counter() - waited)

            x_start = batch.x_start(device)
            t, noise = (
                v.to(device) for v in draw_t_and_noise(config.seed, batch.visit, x_start.shape, config.diffusion_steps)
            )
            weight = batch.weight.to(device)
            x_t = diffusion.q_sample(x_start, t, noise)
            output = engine(x_t, t, inputs.text_emb(batch, device))
            losses = training_losses(diffusion, output, x_start, x_t, t, noise)
            engine.backward((losses["loss"] * weight).mean())
            meters.add(losses, t, weight, batch)
            quarantine.add(step, batch.bad)
            engine.step()
        ema.update(engine, step)
        meters.add_step(engine.grad_norm())

        last = step == config.steps
        if step % config.log_every == 0 or last:
            metrics = meters.read()
            if show:
                show.log(step, metrics | {"lr": lr}, meters.bad)
            seen, bad = seen + metrics["samples"], bad + metrics["bad_samples"]
            if bad > config.data.max_bad_share * max(seen, MIN_SEEN):
                raise TooManyBad(step, bad, seen, config.data.max_bad_share, meters.bad)
            if seen >= MIN_SEEN:
                seen = bad = 0
        if step % config.save_every == 0 or last:
            save(run_dir, step, engine, ema, config, inputs.samples, inputs.meta)
        if last or (config.sample.every and step % config.sample.every == 0):
            with ema.in_place_of_weights(engine):
                if show:
                    show.samples(step, engine.model)
    if show:
        show.close()
