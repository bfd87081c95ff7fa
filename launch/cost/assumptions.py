"""What a plan assumes of the cluster and of data that is not there to be looked at."""

from dataclasses import dataclass

# A 256 px JPEG as img2dataset stores it, with caption and tar headers; LAION-400M at 256 px is some 10 TB.
IMAGE_KB = 25.0


@dataclass(slots=True)
class Options:
    """Prints the memory, time, bytes and GPU-hours of a training before it starts.

    The net is the real one, on tensors without contents; no GPU is needed.

    gpu: name of a GPU in train/monitor/gpus.py.
    nodes: number of nodes.
    gpus_per_node: GPUs of a node.
    link: Gbit/s between a node and the others, each way.
    link_efficiency: share of the link that collectives reach.
    mfu: share of the GPUs' peak that forward and backward reach.
    samples: of the dataset, where it is not there to be counted.
    image_kb: mean kB of a sample's image, caption and tar headers, where the dataset is not there.
    storage: GB/s that all nodes together read; 0 if unknown.
    reserve_gb: GB of a GPU that are left to CUDA, NCCL, cuDNN's workspaces and fragmentation.
    """

    gpu: str = "a100-80g"
    nodes: int = 64
    gpus_per_node: int = 8
    link: float = 1600.0
    link_efficiency: float = 0.8
    mfu: float = 0.4
    samples: int = 1_200_000_000
    image_kb: float = IMAGE_KB
    storage: float = 0.0
    reserve_gb: float = 5.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "link", "link_efficiency", "mfu", "samples", "image_kb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("mfu", "link_efficiency"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share, at most 1")
        for name in ("storage", "reserve_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
