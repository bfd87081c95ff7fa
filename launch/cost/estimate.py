"""The cost of a run: memory, time and bytes, of the real net on tensors without contents."""

import os
from dataclasses import asdict, dataclass, replace
from functools import cache

from tqdm import tqdm

from data.loader.dataset import find_datasets
from data.text.meta import TextMeta
from launch.cost.assumptions import Options
from launch.cost.memory import FP32, Peak, States, most_that_fits, peak, states
from launch.cost.step_cost import Bytes, Flops, image_flops, step_bytes
from launch.cost.traffic import Collectives, Reading, checkpoint_bytes, collectives, embedding_bytes
from model.recompute import MEMORY
from train.config import Config, accumulation
from train.monitor.gpus import GPU, find_gpu
from train.summary import parameters

GB = 1e9


WEIGHT_BYTES = {"bf16": 2, "fp32": FP32}


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """One model.memory: at the configured micro batch, and the largest that fits and divides the batch, 0 for none."""

    step: Bytes
    peak: Peak
    flops: Flops
    fits_at_most: int
    largest: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step."""

    compute: float
    communication: float
    update: float
    reading: float

    @property
    def step(self) -> float:
        """One after another, but for reading, which runs beside the rest."""
        return max(self.compute + self.communication + self.update, self.reading)

    @property
    def bottleneck(self) -> str:
        """What takes the largest part of it."""
        parts = asdict(self)
        return "reading" if self.reading >= self.step else max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that launch/cost/page.py prints."""

    options: Options
    config: Config
    gpu: GPU
    parameters: int
    accumulate: int
    states: States
    choices: dict[str, MemoryChoice]
    collectives: Collectives
    reading: Reading
    samples: int
    looked_at_data: bool
    checkpoint: int
    times: Times
    limit: Times

    @property
    def flops(self) -> Flops:
        """Of an image, with the model.memory that the configuration has."""
        return self.choices[self.config.model.memory].flops

    @property
    def model_flops(self) -> int:
        """Of a step, as MFU counts them."""
        return self.flops.model * self.config.global_batch


def make_plan(options: Options, config: Config) -> Plan:
    """Raises: ValueError for a GPU that is not known, or a micro batch that doesn't divide the batch."""
    gpu, ranks = find_gpu(options.gpu), options.ranks
    accumulate, weight_bytes = accumulation(config, ranks), WEIGHT_BYTES[config.precision]
    count, frozen = parameters(config)
    kept = states(count, ranks, config.optim.name, weight_bytes, frozen)
    room = gpu.memory - options.reserve_gb * GB - kept.total
    choices = {}
    for memory in tqdm(MEMORY, desc="walking the net", unit="choice", leave=False, disable=None):
        choices[memory] = memory_choice(replace_memory(config, memory), count, ranks, room)
    reading, samples, looked = of_data(options, config)
    wires = collectives(count, ranks, weight_bytes)
    flops = choices[config.model.memory].flops.done * config.global_batch
    seconds = wires.seconds(gpu, options.nodes, options.gpus_per_node, options.link * GB / 8, options.link_efficiency)
    bytes_read = reading.sample * config.global_batch
    times = Times(
        compute=flops / (ranks * gpu.tflops * 1e12 * options.mfu),
        communication=seconds,
        # Masters, moments and EMA are read and written, the rest of the update is small beside them.
        update=2 * (kept.master + kept.moments + kept.ema) / gpu.memory_rate,
        reading=bytes_read / (options.storage * GB) if options.storage else 0.0,
    )
    at_peak = flops / (ranks * gpu.tflops * 1e12)
    perfect = wires.seconds(gpu, options.nodes, options.gpus_per_node, options.link * GB / 8, 1.0)
    # At the limit communication hides behind the backward.
    limit = Times(max(at_peak, perfect), 0.0, 0.0, times.reading)
    return Plan(
        options, config, gpu, count, accumulate, kept, choices, wires, reading, samples, looked,
        checkpoint_bytes(kept, ranks), times, limit,
    )  # fmt: skip


def replace_memory(config: Config, memory: str) -> Config:
    """The configuration with another model.memory."""
    return replace(config, model=replace(config.model, memory=memory))


def memory_choice(config: Config, count: int, ranks: int, room: float) -> MemoryChoice:
    """What the configured micro batch takes, and the largest that fits into so many bytes."""
    weight_bytes, per_rank = WEIGHT_BYTES[config.precision], config.global_batch // ranks

    @cache
    def walked(micro_batch: int) -> Bytes:
        accumulated = per_rank > micro_batch
        return step_bytes(config.model, micro_batch, config.precision, accumulated, config.data.tokens, config.lora)

    def needs(micro_batch: int) -> int:
        return peak(walked(micro_batch), count, ranks, weight_bytes).most

    fits_at_most = most_that_fits(needs, config.micro_batch, room)
    fitting = [m for m in range(1, min(fits_at_most, per_rank) + 1) if per_rank % m == 0]
    step = walked(config.micro_batch)
    return MemoryChoice(
        step,
        peak(step, count, ranks, weight_bytes),
        image_flops(config.model, config.data.tokens),
        fits_at_most,
        max(fitting, default=0),
    )


def of_data(options: Options, config: Config) -> tuple[Reading, int, bool]:
    """Bytes of a sample and the number of samples; from the dataset itself, if its shards and embeddings are there."""
    tokens, dim = config.data.tokens, config.model.encoder_dim
    assumed = Reading(options.image_kb * 1e3, embedding_bytes(tokens, dim)), options.samples, False
    try:
        datasets = find_datasets(config.data)
        shards = [shard for dataset in datasets for shard in dataset.shards]
        samples = sum(shard.count for shard in shards)
        sizes = sum(shard.size or os.path.getsize(shard.location) for shard in shards)
        itemsize = {"float16": 2, "float32": 4}.get(TextMeta.read(datasets[0].text).dtype, 2)
    except (ValueError, OSError):
        return assumed
    return Reading(sizes / samples, embedding_bytes(tokens, dim, itemsize)), samples, True
