"""The training: read this page first."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.loader.stream import MicroBatches, micro_batches
from model.diffusion import Diffusion
from model.losses import training_losses
from model.super_resolution import make_net
from model.unet import UNet
from train.checkpoint.resume import resume
from train.checkpoint.writer import CheckpointWriter
from train.config import Config, accumulation
from train.ema import EMA
from train.engine import Engine, build_engine
from train.evaluation.validation import Validation
from train.faults.cross_check import CrossCheck
from train.faults.first_rank import others_wait
from train.faults.guard import Guard
from train.faults.limits import LOADER
from train.faults.preempt import RankConsensus, stop_requested
from train.faults.watchdog import Watchdog
from train.inputs import Inputs
from train.monitor.metrics import Metrics
from train.noise import DeviceBatches
from train.weights.lora import add_lora

if TYPE_CHECKING:
    from train.monitor.progress import RunProgress


def train(config: Config, inputs: Inputs, rank: int, ranks: int, device: torch.device) -> bool:
    """Train up to config.steps, from the latest checkpoint if there is one; False if a signal stopped the run before.

    Raises: TooManyBad; NotFinite; TooManySpikes; RollBack; Corrupted; CheckpointFailed.
    """
    # Build
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    engine, diffusion = build(config, inputs, ranks, device), Diffusion(config.diffusion_steps).to(device)
    ema = EMA(engine, config.ema_decay, tracked=config.ema_snapshot_every > 0)
    # Resume
    first_step, changes, spikes = resume(config, inputs.identity, engine, ema)
    step, last = first_step, first_step == config.steps
    # Load data
    consensus = RankConsensus()  # before the loader workers are forked, so that a signal does not end them either
    stream, batches = load(config, inputs, rank, ranks, first_step, spikes.batches, diffusion, device)
    # Save, validate, measure, show, watch
    watchdog, metrics = Watchdog(rank, config.hang_seconds), Metrics(device, config)
    writer = CheckpointWriter(config, inputs.identity, changes, consensus, watchdog)
    validation = Validation(config, inputs, diffusion, device, consensus, watchdog)
    guard = Guard(config, rank, stream, consensus, writer, spikes)
    cross_check = CrossCheck(config, engine, ema, diffusion, inputs, batches, consensus)
    progress = show(config, inputs, first_step, device) if rank == 0 else None

    for step in range(first_step + 1, config.steps + 1):
        lr, answer = engine.lr(), consensus.ask(stop_requested(), *writer.progress())
        for _ in range(accumulation(config, ranks)):
            # Take a batch, and noise it
            with metrics.phase("data"):
                batch = next(batches)
            x_t = diffusion.q_sample(batch.x_start, batch.t, batch.noise)
            # Predict and score
            with metrics.phase("forward"):
                model_output = engine(x_t, batch.t, inputs.text_emb(batch.text_emb, batch.loaded), *batch.low_res)
                losses = training_losses(diffusion, model_output, batch.x_start, x_t, batch.t, batch.noise)
            with metrics.phase("backward"):
                engine.backward((losses["loss"] * batch.weight).mean())
            metrics.add_micro_batch(losses, batch)
            guard.record(step, batch.bad, losses)
            # Send the next batch while the device computes
            with metrics.phase("data"):
                batches.prefetch()
            # Step, which the engine does after the last micro batch
            with metrics.phase("step"):
                engine.step()
            watchdog.reset()
        # Average the weights
        if engine.stepped:
            ema.update(engine, step)
            metrics.add_step(engine)
        guard.check_step(step, engine)
        last, (stop, *checkpoint) = step == config.steps, answer()
        writer.poll(*checkpoint)
        cross_check.check(step, batch, before_save=bool(save := writer.due(step, last or stop)))
        # Validate
        with metrics.phase("validate"):
            held_out = {} if stop else validation.at(step, engine, ema)
        # Log
        if step % config.log_every == 0 or last or held_out:
            values = metrics.reduce(engine, ema) | held_out
            values |= {"lr": lr, "save_stall_share": writer.stall_share()} | guard.pop_counts() | inputs.pop_counts()
            if progress:
                progress.log(step, values, metrics)
            guard.check_bad_share(step, values, metrics.bad_counts)
        # Save
        if save:
            with metrics.phase("save"):
                writer.begin(save, step, engine, ema, guard.remembered())
        # Sample
        if last or (config.sample.every and step % config.sample.every == 0):
            with metrics.phase("sample"), ema.in_place_of_weights(engine), others_wait(consensus, watchdog) as alive:
                if progress:
                    progress.draw_samples(step, engine.model, after_step=alive)
        if stop:
            break
    # Leave
    writer.finish()
    watchdog.stop()
    if progress:
        progress.close(step, done=last)
    return last


def build(config: Config, inputs: Inputs, ranks: int, device: torch.device) -> Engine:
    """The net before its first step, under ZeRO-1."""
    torch.manual_seed(config.seed)
    inputs.to(device)
    engine = build_engine(build_net(config, inputs, device), config, ranks)
    if inputs.from_weights:
        engine.set_weights(inputs.weights)
        inputs.weights = None
    return engine


def build_net(config: Config, inputs: Inputs, device: torch.device) -> UNet:
    """The net with the matrices of LoRA, if those are what is trained."""
    with device:  # built where it will be: on the host, eight ranks of XL would take 138 GB
        unet = make_net(config.model, config.recompute, config.layout)
    if config.compile:
        unet.compile_stages()
    if config.lora.rank:
        add_lora(unet, config.lora, inputs.weights)
        inputs.weights = None
    return unet


def load(
    config: Config, inputs: Inputs, rank: int, ranks: int, first_step: int, left_out: list[int], diffusion: Diffusion,
    device: torch.device,
) -> tuple[MicroBatches, DeviceBatches]:  # fmt: skip
    """The order of this rank's micro batches after first_step, and an iterator over them to the end of the run.

    left_out: global batches that no step takes.
    """
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, image_size=config.model.image_size, seed=config.seed,
        global_batch=config.global_batch, micro_batch=config.micro_batch, rank=rank, ranks=ranks, step=first_step,
        left_out=left_out, low_res_size=config.model.low_res_size,
    )  # fmt: skip
    patience = LOADER * config.hang_seconds
    loaded = micro_batches(stream, config.data.workers, pin_memory=device.type == "cuda", patience=patience)
    wanted = islice(loaded, (config.steps - first_step) * stream.micro_batches)
    return stream, DeviceBatches(wanted, config.seed, diffusion, device)


def show(config: Config, inputs: Inputs, first_step: int, device: torch.device) -> "RunProgress":
    """What the user sees of the run, on the first rank."""
    from train.monitor.progress import RunProgress  # here: it takes seconds, and the other ranks need none of it

    return RunProgress(config, inputs, Path(config.run_dir), first_step, device)
