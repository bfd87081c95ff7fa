"""The training: read this page first."""

from pathlib import Path

import torch

from data.quarantine import Quarantine
from data.stream import MicroBatches, micro_batches
from model.diffusion import Diffusion
from model.losses import training_losses
from model.unet import UNet
from train.adapter import add_lora
from train.checkpoint import resume
from train.config import Config, accumulation
from train.ema import EMA
from train.engine import Engine, build_engine
from train.guard import BadShare, FiniteSteps, Watchdog
from train.inputs import Inputs, begins_from_weights
from train.meters import Meters
from train.noise import draw_t_and_noise
from train.preempt import Consent, mark_done
from train.saver import Saver
from train.show import Show


def train(config: Config, inputs: Inputs, rank: int, ranks: int, device: torch.device) -> bool:
    """Train to config.steps, going on from the latest checkpoint of config.run_dir; False if asked to leave before.

    Raises: TooManyBad when more samples than data.max_bad_share cannot be read; NotFinite, CheckpointFailed.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    engine = begin(config, inputs, ranks, device)
    ema = EMA(engine, config.ema_decay)
    diffusion = Diffusion(config.diffusion_steps).to(device)
    first_step = resume(run_dir, engine, ema)
    consent = Consent()  # before the loader workers are forked, so that a signal to them is no end either
    saver = Saver(config, inputs.samples, inputs.meta, consent)
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, config.model.image_size, config.seed, config.global_batch,
        config.micro_batch, rank, ranks, first_step,
    )  # fmt: skip
    batches = micro_batches(stream, config.data.workers, pin_memory=device.type == "cuda")
    meters, quarantine = Meters(device, config), Quarantine(run_dir, rank)
    show = Show(config, inputs, run_dir, first_step, device) if rank == 0 else None
    finite, watchdog = FiniteSteps(config.max_skipped, stream, quarantine, consent), Watchdog(rank, config.hang_seconds)
    bad_share, last = BadShare(config.data.max_bad_share), first_step == config.steps
    if show and not last:
        (run_dir / "done").unlink(missing_ok=True)

    for step in range(first_step + 1, config.steps + 1):
        lr = engine.lr()
        for _ in range(accumulation(config, ranks)):
            watchdog.feed()
            with meters.phase("data"):
                batch = next(batches)

            x_start = batch.x_start(device)
            t, noise = (
                v.to(device) for v in draw_t_and_noise(config.seed, batch.visit, x_start.shape, config.diffusion_steps)
            )
            weight = batch.weight.to(device)
            x_t = diffusion.q_sample(x_start, t, noise)
            with meters.phase("forward"):
                output = engine(x_t, t, batch.text_emb.to(device, non_blocking=True))
                losses = training_losses(diffusion, output, x_start, x_t, t, noise)
            with meters.phase("backward"):
                engine.backward((losses["loss"] * weight).mean())
            finite.note(losses["loss"])
            meters.add(losses, t, weight, batch)
            quarantine.add(step, batch.bad)
            with meters.phase("step"):
                engine.step()
        if engine.stepped:
            ema.update(engine, step)
            meters.add_step(engine)
        finite.judge(step, engine.stepped)

        last, stop = step == config.steps, consent.stop()
        saver.poll()
        if step % config.log_every == 0 or last:
            metrics = meters.read(engine, ema) | {
                "save_stall_share": saver.stall_share(),
                "skipped_steps": finite.read(),
            }
            if show:
                show.log(step, metrics | {"lr": lr}, meters.bad)
            bad_share.judge(step, metrics, meters.bad)
        if step % config.save_every == 0 or last or stop:
            with meters.phase("save"):
                saver.begin(step, engine, ema)
        if last or (config.sample.every and step % config.sample.every == 0):
            with meters.phase("sample"), ema.in_place_of_weights(engine):
                if show:
                    show.samples(step, engine.model)
        if stop:
            break
    saver.finish()
    watchdog.stop()
    if show:
        show.close()
        if last:
            mark_done(run_dir, config.steps)
    return last


def begin(config: Config, inputs: Inputs, ranks: int, device: torch.device) -> Engine:
    """The engine around the net as it starts: fresh, from weights, or with matrices of LoRA beside them."""
    with device:  # built where it will be: on the host, eight ranks of XL would take 138 GB
        unet = UNet(config.model)
    if config.compile:  # the forward alone, for DeepSpeed hangs hooks on the module that can't be traced
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    if config.lora.rank:
        add_lora(unet, config.lora, inputs.weights)
    engine = build_engine(unet, config, ranks)
    if begins_from_weights(config):
        engine.set_weights(inputs.weights)
    inputs.weights = None
    return engine
