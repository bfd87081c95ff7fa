"""How long a run will take: calculated for a GPU, measured on a CPU; what is told before it starts."""

import os
import time

import torch

from data.device import ranks_of_node, uses_gpu
from data.progress import duration
from train.config import Config
from train.monitor.flops import peak_flops, training_flops
from train.monitor.gpus import ASSUMED_MFU
from train.monitor.step_memory import DTYPES, inputs
from train.weights.lora import add_lora

# A micro batch of more FLOP is not tried on a CPU, which would take long for it.
MOST_TRIED = 2e12
# So often, or for so many seconds.
TRIES, LONG = 3, 5.0


def describe_time(config: Config, of_grids: int, of_validations: int) -> str:
    """How long a run will take on this machine, in words.

    of_grids, of_validations: passes of an image through the net beside the training's own. The first rank makes the
    grids alone, while the others wait; the validations are shared out.
    """
    if config.needs_gpu and not uses_gpu() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return "calculated for a card by python -m launch.plan; this machine has no GPU"
    flops = training_flops(config.model, config.data.tokens, config.lora, config.recompute).total
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if uses_gpu():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not (peak := peak_flops(device)):
            return f"not known for {torch.cuda.get_device_name(device)}: the bar tells it after its first line"
        of_a_rank = flops / (peak * ASSUMED_MFU)
        why = f"if forward and backward reach {ASSUMED_MFU:.0%} of the card's peak"
    elif flops * config.micro_batch > MOST_TRIED:
        return f"not tried here: a micro batch takes {flops * config.micro_batch / 1e12:,.1f} TFLOP"
    else:
        # All cores are this rank's until the ranks of a node share them (train/engine.py).
        sharing = 1 if "OMP_NUM_THREADS" in os.environ else ranks_of_node()
        of_a_rank = sharing * seconds_of_micro_batch(config) / config.micro_batch
        why = "as one micro batch takes now on this CPU"
    # The backward takes twice as long as the forward.
    shared_out, alone = config.steps * config.global_batch + of_validations / 3, of_grids / 3
    seconds = (shared_out / ranks + alone) * of_a_rank
    return f"about {duration(seconds)}, {ranks / of_a_rank:,.1f} images/s, {why}"


def seconds_of_micro_batch(config: Config) -> float:
    """Seconds of a forward and backward of a micro batch on this CPU, the fewest of a few.

    Draws nothing from torch's generator.
    """
    from model.super_resolution import make_net  # here: a GPU needs none of it

    with torch.random.fork_rng(devices=[]):
        unet = make_net(config.model, config.recompute)
        if config.lora.rank:
            add_lora(unet, config.lora)
        unet.to(DTYPES[config.precision])
        given = inputs(config.model, config.micro_batch, config.data.tokens)
        tries: list[float] = []
        # The first one also makes threads and memory, which is little beside seconds.
        while len(tries) < TRIES and sum(tries) < LONG:
            start = time.perf_counter()
            unet(*given).sum().backward()
            tries.append(time.perf_counter() - start)
    return min(tries)
