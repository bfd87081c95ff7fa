"""The cost of a run: memory, time and traffic, counted on the real net with tensors that have no contents."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from data.loader.dataset import Dataset, find_datasets
from data.progress import each
from data.storage.locations import file_size
from data.text.meta import LOWRANK, TextMeta, caption_folder, sidecar_location
from launch.cost.network import Buckets, Network, bucket_costs
from launch.cost.options import PlanOptions, check_options
from launch.cost.traffic import Collectives, Reading, checkpoint_bytes, collectives, embedding_bytes, ring_rate
from model.config import RECOMPUTE
from train.config import Config, accumulation
from train.inputs import resolve_sizes, resolve_text_shape
from train.monitor.flops import Flops, training_flops
from train.monitor.gpus import GPU, find_gpu
from train.monitor.memory import (
    WEIGHT_BYTES,
    Peak,
    States,
    averages_of,
    construction,
    largest_parameter,
    most_that_fits,
    peak,
    states,
)  # fmt: skip
from train.monitor.step_memory import Bytes, walk_step
from train.summary import parameters

GB = 1e9


@dataclass(frozen=True, slots=True)
class RecomputeCost:
    """What one choice of recomputation costs.

    step, peak: memory at the configured micro batch.  flops: of an image.
    largest: the largest micro batch that fits.  largest_dividing: the largest that fits and divides the batch, or 0.
    """

    step: Bytes
    peak: Peak
    flops: Flops
    largest: int
    largest_dividing: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step, by part; of the network those that the step waits for."""

    compute: float
    all_reduce: float
    all_gather: float
    update: float
    reading: float

    @property
    def step(self) -> float:
        """The parts run one after another, except reading, which runs beside the others."""
        return max(self.compute + self.all_reduce + self.all_gather + self.update, self.reading)

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = asdict(self)
        return "reading" if self.reading >= self.step else max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that launch/cost/page.py prints.

    parameters: that are trained.  largest: elements of the largest of them.  costs: by choice of recomputation.
    construction: the most bytes before the first step.  buckets: as the engine has them, then larger ones.
    checkpoint: bytes.  alone: a step without a network.  limit: the physical limit.
    sizes: which sizes of the configuration follow the data, in a line; '' for none.
    """

    options: PlanOptions
    config: Config
    gpu: GPU
    parameters: int
    largest: int
    accumulate: int
    states: States
    construction: int
    costs: dict[str, RecomputeCost]
    collectives: Collectives
    buckets: list[Buckets]
    reading: Reading
    assumed_text: bool
    checkpoint: int
    alone: Times
    limit: Times
    sizes: str

    @property
    def flops(self) -> Flops:
        """Of an image, without recomputation."""
        return self.costs[RECOMPUTE[0]].flops

    @property
    def model_flops(self) -> int:
        """FLOP of a step as MFU counts them: forward and backward, without what is computed again."""
        return self.flops.total * self.config.global_batch

    @property
    def networks(self) -> dict[float, Network]:
        """By Gbit/s of a node's link, with the buckets of the engine."""
        return self.buckets[0].networks

    @property
    def times(self) -> Times:
        """As the options say, with the all-reduces beside the backward."""
        return self.overlapped(self.options.link)

    def overlapped(self, link: float) -> Times:
        """The same with this many Gbit/s of a node's link."""
        network = self.networks[link]
        return replace(self.alone, all_reduce=network.exposed, all_gather=network.all_gather)

    def nothing_hidden(self, link: float) -> Times:
        """With the all-reduces behind the backward."""
        network = self.networks[link]
        return replace(self.alone, all_reduce=network.all_reduce, all_gather=network.all_gather)


def make_plan(options: PlanOptions, config: Config) -> Plan:
    """Count what a run costs, in a quarter of a minute on one core.

    Raises: ValueError for a value that cannot be, or a micro batch that does not divide the batch.
    """
    check_options(options)
    assumed_text = resolve_text_shape(config)
    sizes = resolve_sizes(config, options.samples)
    gpu, ranks = find_gpu(options.gpu), options.ranks
    accumulate, weight_bytes = accumulation(config, ranks), WEIGHT_BYTES[config.precision]
    trained, frozen = parameters(config)
    largest = largest_parameter(config)
    resident = states(trained, ranks, config.optim.name, weight_bytes, frozen, averages_of(config))
    built = construction(trained, ranks, weight_bytes, frozen)
    available = gpu.memory - options.reserve_gb * GB
    available = available - resident.total if built <= available else 0.0
    costs = {}
    for recompute in each(RECOMPUTE, "counting", "choice"):
        costs[recompute] = recompute_cost(config, recompute, trained, largest, ranks, available)
    traffic, reading = collectives(trained, ranks, weight_bytes), estimate_reading(options, config)

    flops = costs[config.recompute].flops
    alone, buckets = step_times(options, config, flops, largest, resident, reading)
    at_peak = alone.compute * options.mfu
    # At the limit the links are used whole, and all communication hides behind the compute.
    whole = ring_rate(gpu, options.nodes, options.gpus_per_node, options.link * GB / 8)
    at_full_rate = traffic.sent / whole
    limit = Times(max(at_peak, at_full_rate), 0.0, 0.0, 0.0, alone.reading)
    return Plan(
        options, config, gpu, trained, largest, accumulate, resident,
        built, costs, traffic, buckets, reading, assumed_text,
        checkpoint_bytes(resident, ranks), alone, limit, sizes,
    )  # fmt: skip


def step_times(
    options: PlanOptions, config: Config, flops: Flops, largest: int, resident: States, reading: Reading
) -> tuple[Times, list[Buckets]]:
    """A step without a network, and what the collectives add to it for each size of bucket, the engine's first."""
    gpu = find_gpu(options.gpu)
    at_peak = flops.total * config.global_batch / (options.ranks * gpu.tflops * 1e12)
    alone = Times(
        compute=at_peak / options.mfu,
        all_reduce=0.0,
        all_gather=0.0,
        # Masters, moments and averages are read and written; the rest of the update is small beside them.
        update=2 * (resident.master + resident.moments + resident.ema) / gpu.memory_rate,
        reading=reading.sample * config.global_batch / (options.storage * GB) if options.storage else 0.0,
    )
    # Of the last micro batch: the gradients of the others are only added up.
    backward = alone.compute / accumulation(config, options.ranks) * flops.backward / flops.total
    return alone, bucket_costs(options, config, gpu, flops, largest, backward)


def estimate_step(options: PlanOptions, config: Config) -> tuple[float, int]:
    """Seconds of a step and bytes of a checkpoint as in make_plan, without the memory of a step, which takes longer.

    Raises: ValueError for a value that cannot be, or a micro batch that does not divide the batch.
    """
    check_options(options)
    resolve_text_shape(config)
    (trained, frozen), ranks = parameters(config), options.ranks
    accumulation(config, ranks)
    weight_bytes = WEIGHT_BYTES[config.precision]
    resident = states(trained, ranks, config.optim.name, weight_bytes, frozen, averages_of(config))
    flops = training_flops(config.model, config.data.tokens, config.lora, config.recompute)
    reading = estimate_reading(options, config)
    alone, (engine, *_) = step_times(options, config, flops, largest_parameter(config), resident, reading)
    network = engine.networks[options.link]
    times = replace(alone, all_reduce=network.exposed, all_gather=network.all_gather)
    return times.step, checkpoint_bytes(resident, ranks)


def recompute_cost(
    config: Config, recompute: str, trained: int, largest: int, ranks: int, available: float
) -> RecomputeCost:
    """What a choice of recomputation costs.  available: bytes of a GPU for what a step adds to its states."""
    weight_bytes, per_rank = WEIGHT_BYTES[config.precision], config.global_batch // ranks
    walk = walk_step(config.model, config.precision, config.data.tokens, config.lora, recompute)

    def step(micro_batch: int) -> Bytes:
        return walk.bytes(micro_batch, accumulated=per_rank > micro_batch)

    def peak_at(micro_batch: int) -> Peak:
        return peak(step(micro_batch), trained, ranks, weight_bytes, largest)

    # In micro batches as large as the rank's share of the batch or larger nothing is accumulated, and they take less.
    fits = most_that_fits(lambda more: peak_at(per_rank + more - 1).most, available) + per_rank - 1
    if fits < per_rank:
        fits = min(per_rank - 1, most_that_fits(lambda micro_batch: peak_at(micro_batch).most, available))
    dividing = [m for m in range(1, min(fits, per_rank) + 1) if per_rank % m == 0]
    flops = training_flops(config.model, config.data.tokens, config.lora, recompute)
    return RecomputeCost(step(config.micro_batch), peak_at(config.micro_batch), flops, fits, max(dividing, default=0))


def estimate_reading(options: PlanOptions, config: Config) -> Reading:
    """What is read, counted in the dataset if its shards and embeddings are there."""
    tokens, dim = config.data.tokens, config.model.encoder_dim
    try:
        datasets = find_datasets(config.data)
        shards = [shard for dataset in datasets for shard in dataset.shards]
        samples, stored = sum(dataset.samples for dataset in datasets), sum(shard.count for shard in shards)
        size = sum(shard.size or os.path.getsize(shard.location) for shard in shards)
        embedding = _embedding_size(datasets[0], tokens, dim)
    except (ValueError, OSError):
        return Reading(options.image_kb * 1e3, embedding_bytes(tokens, dim), options.samples, counted=False)
    # What is not chosen is passed over.
    return Reading(size / stored, embedding, samples, counted=True)


def _embedding_size(dataset: Dataset, tokens: int, dim: int) -> int:
    """Bytes of a caption's embedding in its tar; of lowrank, whose captions differ, the first sidecar's average.

    Without a sidecar, as with text.mode=online, they are taken to be those of float16.
    Raises: ValueError.
    """
    meta, shard = TextMeta.read(dataset.text), next((shard for shard in dataset.shards if shard.count), None)
    if meta.dtype == LOWRANK and shard:
        with suppress(OSError):
            return file_size(sidecar_location(shard, caption_folder(dataset.text, dataset.fields[0]))) // shard.count
    return embedding_bytes(tokens, dim, {"float16": 2, "float32": 4}.get(meta.dtype, 2))
