"""The cost of a run: memory, time and traffic, counted on the real net with tensors that have no contents."""

import os
from dataclasses import asdict, dataclass
from functools import cache

from tqdm import tqdm

from data.loader.dataset import find_datasets
from data.text.meta import TextMeta
from launch.cost.options import PlanOptions, check_options
from launch.cost.traffic import Collectives, Reading, checkpoint_bytes, collectives, embedding_bytes
from model.config import RECOMPUTE
from train.config import Config, accumulation
from train.inputs import resolve_text_shape
from train.monitor.flops import Flops, training_flops
from train.monitor.gpus import GPU, find_gpu
from train.monitor.memory import WEIGHT_BYTES, Peak, States, largest_parameter, most_that_fits, peak, states
from train.monitor.step_memory import Bytes, step_bytes
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
    """Seconds of one step, by part."""

    compute: float
    communication: float
    update: float
    reading: float

    @property
    def step(self) -> float:
        """The parts run one after another, except reading, which runs beside the others."""
        return max(self.compute + self.communication + self.update, self.reading)

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = asdict(self)
        return "reading" if self.reading >= self.step else max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that launch/cost/page.py prints.

    parameters: that are trained.  largest: elements of the largest of them.  costs: by choice of recomputation.
    checkpoint: bytes.  times, limit: as assumed, and at the physical limit.
    """

    options: PlanOptions
    config: Config
    gpu: GPU
    parameters: int
    largest: int
    accumulate: int
    states: States
    costs: dict[str, RecomputeCost]
    collectives: Collectives
    reading: Reading
    assumed_text: bool
    checkpoint: int
    times: Times
    limit: Times

    @property
    def flops(self) -> Flops:
        """Of an image, without recomputation."""
        return self.costs[RECOMPUTE[0]].flops

    @property
    def model_flops(self) -> int:
        """FLOP of a step as MFU counts them: forward and backward, without what is computed again."""
        return self.flops.total * self.config.global_batch


def make_plan(options: PlanOptions, config: Config) -> Plan:
    """Count what a run costs, in a minute or two on one core.

    Raises: ValueError for a value that cannot be, or a micro batch that does not divide the batch.
    """
    check_options(options)
    assumed_text = resolve_text_shape(config)
    gpu, ranks = find_gpu(options.gpu), options.ranks
    accumulate, weight_bytes = accumulation(config, ranks), WEIGHT_BYTES[config.precision]
    trained, frozen = parameters(config)
    resident = states(trained, ranks, config.optim.name, weight_bytes, frozen)
    available = gpu.memory - options.reserve_gb * GB - resident.total
    costs = {}
    for recompute in tqdm(RECOMPUTE, desc="counting", unit="choice", leave=False, disable=None):
        costs[recompute] = recompute_cost(config, recompute, trained, ranks, available)
    traffic, reading = collectives(trained, ranks, weight_bytes), estimate_reading(options, config)

    node_link = options.link * GB / 8
    at_peak = costs[config.recompute].flops.total * config.global_batch / (ranks * gpu.tflops * 1e12)
    times = Times(
        compute=at_peak / options.mfu,
        communication=traffic.seconds(gpu, options.nodes, options.gpus_per_node, node_link, options.link_efficiency),
        # Masters, moments and EMA are read and written; the rest of the update is small beside them.
        update=2 * (resident.master + resident.moments + resident.ema) / gpu.memory_rate,
        reading=reading.sample * config.global_batch / (options.storage * GB) if options.storage else 0.0,
    )
    # At the limit the links are used whole, and communication hides behind the backward.
    at_full_rate = traffic.seconds(gpu, options.nodes, options.gpus_per_node, node_link, 1.0)
    limit = Times(max(at_peak, at_full_rate), 0.0, 0.0, times.reading)
    checkpoint = checkpoint_bytes(resident, ranks)
    return Plan(
        options, config, gpu, trained, largest_parameter(config), accumulate, resident, costs, traffic, reading,
        assumed_text, checkpoint, times, limit,
    )  # fmt: skip


def recompute_cost(config: Config, recompute: str, trained: int, ranks: int, available: float) -> RecomputeCost:
    """What a choice of recomputation costs.  available: bytes of a GPU for what a step adds to its states."""
    weight_bytes, per_rank = WEIGHT_BYTES[config.precision], config.global_batch // ranks
    tokens, lora, largest = config.data.tokens, config.lora, largest_parameter(config)

    @cache
    def step(micro_batch: int) -> Bytes:
        return step_bytes(config.model, micro_batch, config.precision, per_rank > micro_batch, tokens, lora, recompute)

    def peak_at(micro_batch: int) -> Peak:
        return peak(step(micro_batch), trained, ranks, weight_bytes, largest)

    fits = most_that_fits(lambda micro_batch: peak_at(micro_batch).most, config.micro_batch, available)
    dividing = [m for m in range(1, min(fits, per_rank) + 1) if per_rank % m == 0]
    flops = training_flops(config.model, tokens, lora, recompute)
    return RecomputeCost(step(config.micro_batch), peak_at(config.micro_batch), flops, fits, max(dividing, default=0))


def estimate_reading(options: PlanOptions, config: Config) -> Reading:
    """What is read, counted in the dataset if its shards and embeddings are there."""
    tokens, dim = config.data.tokens, config.model.encoder_dim
    try:
        datasets = find_datasets(config.data)
        shards = [shard for dataset in datasets for shard in dataset.shards]
        samples = sum(shard.count for shard in shards)
        size = sum(shard.size or os.path.getsize(shard.location) for shard in shards)
        itemsize = {"float16": 2, "float32": 4}.get(TextMeta.read(datasets[0].text).dtype, 2)
    except (ValueError, OSError):
        return Reading(options.image_kb * 1e3, embedding_bytes(tokens, dim), options.samples, counted=False)
    return Reading(size / samples, embedding_bytes(tokens, dim, itemsize), samples, counted=True)
