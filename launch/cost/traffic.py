"""What goes over wires and into files: gradients and weights, images and embeddings, checkpoints."""

from dataclasses import dataclass

from launch.cost.memory import States, partition
from train.monitor.gpus import GPU


@dataclass(frozen=True, slots=True)
class Collectives:
    """Of one step. reduced, gathered: bytes of the tensors, gradients and weights, that a rank takes part with.

    sent: bytes that each GPU sends for them around a ring of all.
    """

    reduced: int
    gathered: int
    sent: float

    def seconds(self, gpu: GPU, nodes: int, gpus_per_node: int, node_link: float, efficiency: float) -> float:
        """At a node's link of so many bytes/s each way; every byte that a ring moves passes each node's link once."""
        rates = [gpu.link_rate] * (gpus_per_node > 1) + [node_link] * (nodes > 1)
        return self.sent / (min(rates) * efficiency) if rates else 0.0


def collectives(trained: int, ranks: int, weight_bytes: int) -> Collectives:
    """DeepSpeed's ZeRO-1 all-reduces every gradient, once a step, then gathers the weights."""
    reduced = weight_bytes * trained
    gathered = weight_bytes * partition(trained, ranks) * ranks
    return Collectives(reduced, gathered, (2 * reduced + gathered) * (ranks - 1) / ranks)


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes of one sample: its image with what the tar puts around it, and its embedding."""

    image: float
    embedding: float

    @property
    def sample(self) -> float:
        return self.image + self.embedding


def embedding_bytes(tokens: int, dim: int, itemsize: int = 2) -> int:
    """Of one caption as a member of a tar: the header of 512 bytes, and the .npy padded to that."""
    block = 512
    return block + -(-(128 + tokens * dim * itemsize) // block) * block


def checkpoint_bytes(rank: States, ranks: int) -> int:
    """Masters, EMA and moments of all ranks; manifest and headers are below a thousandth of it."""
    return ranks * (rank.master + rank.ema + rank.moments)
