"""The training: read this page first."""

from pathlib import Path

import torch

from data.loader.stream import MicroBatches, micro_batches
from model.diffusion import Diffusion
from model.losses import training_losses
from model.unet import UNet
from train.checkpoint.resume import resume
from train.checkpoint.writer import CheckpointWriter
from train.config import Config, accumulation
from train.ema import EMA
from train.engine import build_engine
from train.faults.guard import Guard
from train.faults.preempt import RankConsensus, mark_done
from train.faults.watchdog import Watchdog
from train.inputs import Inputs, begins_from_weights
from train.monitor.metrics import Metrics
from train.monitor.progress import RunProgress
from train.noise import draw_t_and_noise
from train.weights.lora import add_lora


def train(config: Config, inputs: Inputs, rank: int, ranks: int, device: torch.device) -> bool:
    """Train to config.steps, going on from the latest checkpoint of config.run_dir; False if asked to leave before.

    Raises: TooManyBad when more samples than data.max_bad_share cannot be read; NotFinite, CheckpointFailed.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    inputs.to(device)
    engine = build_engine(build_net(config, inputs, device), config, ranks)
    if begins_from_weights(config):
        engine.set_weights(inputs.weights)
        inputs.weights = None
    ema = EMA(engine, config.ema_decay)
    diffusion = Diffusion(config.diffusion_steps).to(device)
    first_step = resume(run_dir, engine, ema)
    consent = RankConsensus()  # before the loader workers are forked, so that a signal to them is no end either
    saver = CheckpointWriter(config, inputs.samples, inputs.meta, consent)
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, image_size=config.model.image_size, seed=config.seed,
        global_batch=config.global_batch, micro_batch=config.micro_batch, rank=rank, ranks=ranks, step=first_step,
    )  # fmt: skip
    batches = micro_batches(stream, config.data.workers, pin_memory=device.type == "cuda")
    meters = Metrics(device, config)
    show = RunProgress(config, inputs, run_dir, first_step, device) if rank == 0 else None
    guard, watchdog = Guard(config, rank, stream, consent), Watchdog(rank, config.hang_seconds)
    last = first_step == config.steps

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
                output = engine(x_t, t, inputs.text_emb(batch, device))
                losses = training_losses(diffusion, output, x_start, x_t, t, noise)
            with meters.phase("backward"):
                engine.backward((losses["loss"] * weight).mean())
            meters.add(losses, t, weight, batch)
            guard.note(step, batch, losses["loss"])
            with meters.phase("step"):
                engine.step()
        if engine.stepped:
            ema.update(engine, step)
            meters.add_step(engine)
        guard.judge(step, engine.stepped)

        last, stop = step == config.steps, consent.stop()
        saver.poll()
        if step % config.log_every == 0 or last:
            metrics = meters.read(engine, ema)
            metrics |= {"lr": lr, "save_stall_share": saver.stall_share(), "skipped_steps": guard.read()}
            if show:
                show.log(step, metrics, meters.bad)
            guard.judge_share(step, metrics, meters.bad)
        if step % config.save_every == 0 or last or stop:
            with meters.phase("save"):
                saver.begin(step, engine, ema)
        if last or (config.sample.every and step % config.sample.every == 0):
            watchdog.feed(6 * config.hang_seconds)  # the first rank samples, the others wait
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


def build_net(config: Config, inputs: Inputs, device: torch.device) -> UNet:
    """The net as it starts, with the matrices of LoRA where those are what is trained."""
    with device:  # built where it will be: on the host, eight ranks of XL would take 138 GB
        unet = UNet(config.model)
    if config.compile:  # the forward alone, for DeepSpeed hangs hooks on the module that can't be traced
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    if config.lora.rank:
        add_lora(unet, config.lora, inputs.weights)
        inputs.weights = None
    return unet
