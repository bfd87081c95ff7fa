"""The arguments of `python -m launch.plan` beside those of a training; no torch, so that --help is quick."""

from dataclasses import dataclass

from data.checks import check_at_least, check_choice, check_share
from train.monitor.gpus import ASSUMED_MFU, GPUS

# KB of a 256 px JPEG as img2dataset stores it, with caption and tar headers: LAION-400M takes some 10 TB at 256 px.
IMAGE_KB = 25.0


@dataclass(slots=True)
class PlanOptions:
    """Print what a training takes before it starts: memory, time, traffic and GPU-hours.

    gpu: the card, by its name in train/monitor/gpus.py
    nodes: number of nodes
    gpus_per_node: GPUs of a node, each with one rank
    link: Gbit/s of a node's link to the others, each way
    link_efficiency: share of the link's rate that collectives reach
    mfu: share of the GPUs' peak that forward and backward reach
    samples: images of the dataset, used where its shards are not found
    image_kb: KB of an image in a shard, used where the shards are not found
    storage: GB/s that all nodes together can read, 0 if unknown
    reserve_gb: GB of a GPU that CUDA, NCCL, cuDNN's workspaces and fragmentation take
    """

    gpu: str = "a100-80g"
    nodes: int = 64
    gpus_per_node: int = 8
    link: float = 1600.0
    link_efficiency: float = 0.8
    mfu: float = ASSUMED_MFU
    samples: int = 1_200_000_000
    image_kb: float = IMAGE_KB
    storage: float = 0.0
    reserve_gb: float = 5.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def check_options(options: PlanOptions) -> None:
    """Raises: ValueError that names the argument."""
    check_choice("gpu", options.gpu, GPUS)
    for name in ("nodes", "gpus_per_node", "samples"):
        check_at_least(name, getattr(options, name), 1)
    for name in ("link", "link_efficiency", "mfu", "image_kb"):
        check_at_least(name, getattr(options, name), 0.001)  # they divide, so 0 cannot be
    for name in ("storage", "reserve_gb"):
        check_at_least(name, getattr(options, name), 0)
    for name in ("link_efficiency", "mfu"):
        check_share(name, getattr(options, name))
