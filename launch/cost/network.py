"""What the collectives of a step take, and what the size of the buckets has to do with it."""

from dataclasses import dataclass

from launch.cost.options import PlanOptions
from launch.cost.overlap import Bucket, exposed_seconds, fill_buckets
from launch.cost.traffic import Collectives, collectives, ring_rate
from train.config import Config
from train.monitor.flops import Flops
from train.monitor.gpus import GPU, NODE_LINKS
from train.monitor.memory import BUCKETS, WEIGHT_BYTES

# Sizes of a bucket that are compared, as multiples of the largest parameter, which is the engine's: train/engine.py.
MULTIPLES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Network:
    """Seconds of a step's collectives at one rate of the nodes' links.

    all_reduce: of the gradients, alone.  exposed: by which they make the step longer, behind the backward and in it.
    all_gather: of the weights, which nothing hides.
    """

    all_reduce: float
    exposed: float
    all_gather: float

    @property
    def hidden(self) -> float:
        return self.all_reduce - self.exposed


@dataclass(frozen=True, slots=True)
class Buckets:
    """What one size and number of buckets costs.

    elements: of a bucket.  memory: bytes of those there is room for.  filled: in a step.
    networks: by Gbit/s of a node's link.
    """

    elements: int
    memory: int
    filled: list[Bucket]
    networks: dict[float, Network]


def bucket_costs(
    options: PlanOptions, config: Config, gpu: GPU, flops: Flops, largest: int, backward: float
) -> list[Buckets]:
    """What each size of MULTIPLES costs, the engine's first, and last the engine's size if there were room for all.

    largest: elements of the largest parameter.  backward: seconds of the last micro batch's, in which the gradients of
    all are reduced.
    """
    width = WEIGHT_BYTES[config.precision]
    traffic = collectives(sum(gradient.elements for gradient in flops.gradients), options.ranks, width)

    def cost(elements: int, all_at_once: bool = False) -> Buckets:
        filled = fill_buckets(flops, elements, config.compile)
        buffers, memory = BUCKETS, BUCKETS * width * elements
        if all_at_once:
            buffers, memory = len(filled) + 1, traffic.reduced
        networks = {
            link: network_time(options, gpu, traffic, filled, buffers, backward, link)
            for link in {*NODE_LINKS, options.link}
        }
        return Buckets(elements, memory, filled, networks)

    return [*(cost(multiple * largest) for multiple in MULTIPLES), cost(largest, all_at_once=True)]


def network_time(
    options: PlanOptions, gpu: GPU, traffic: Collectives, filled: list[Bucket], buffers: int, backward: float,
    link: float,
) -> Network:  # fmt: skip
    """Seconds of a step's collectives.  buffers: as in exposed_seconds.  link: Gbit/s of a node's link."""
    rate = ring_rate(gpu, options.nodes, options.gpus_per_node, link * 1e9 / 8)
    ready = [bucket.ready * backward for bucket in filled]
    elements = sum(bucket.elements for bucket in filled)
    sizes = [traffic.sent_reducing * bucket.elements / elements for bucket in filled]
    return Network(
        all_reduce=traffic.sent_reducing / (rate * options.link_efficiency),
        exposed=exposed_seconds(ready, sizes, rate, options.link_efficiency, buffers),
        all_gather=traffic.sent_gathering / (rate * options.link_efficiency),
    )
