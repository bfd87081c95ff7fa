"""What goes through the network and into files: gradients and weights, images and embeddings, checkpoints."""

import math
from dataclasses import dataclass

from train.monitor.gpus import GPU
from train.monitor.memory import States, partition


@dataclass(frozen=True, slots=True)
class Collectives:
    """Bytes of the collectives of one step.

    reduced, gathered: of the tensors, gradients and weights, that every rank reduces and gathers.
    """

    reduced: int
    gathered: int
    ranks: int

    @property
    def sent_reducing(self) -> float:
        """By each GPU for the all-reduces, around a ring of all GPUs."""
        return 2 * self.reduced * (self.ranks - 1) / self.ranks

    @property
    def sent_gathering(self) -> float:
        """By each GPU for the all-gather, around the same ring."""
        return self.gathered * (self.ranks - 1) / self.ranks

    @property
    def sent(self) -> float:
        """By each GPU in a step."""
        return self.sent_reducing + self.sent_gathering


def collectives(trained: int, ranks: int, weight_bytes: int) -> Collectives:
    """DeepSpeed's ZeRO-1 all-reduces every gradient, once a step, then gathers the weights."""
    return Collectives(weight_bytes * trained, weight_bytes * partition(trained, ranks) * ranks, ranks)


def ring_rate(gpu: GPU, nodes: int, gpus_per_node: int, node_link: float) -> float:
    """Bytes/s of the slowest link of a ring of all GPUs; every byte of it passes each node's link once.

    node_link: bytes/s each way.
    """
    return min([gpu.link_rate] * (gpus_per_node > 1) + [node_link] * (nodes > 1), default=math.inf)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read.

    image, embedding: bytes of a sample, the image with what the tar puts around it.  samples: of the whole dataset.
    counted: whether the dataset was found and these figures are its own; otherwise they are assumed.
    """

    image: float
    embedding: float
    samples: int
    counted: bool

    @property
    def sample(self) -> float:
        return self.image + self.embedding


def embedding_bytes(tokens: int, dim: int, itemsize: int = 2) -> int:
    """Bytes of a caption's embedding in a tar: a header of 512 bytes and the .npy, padded to a multiple of 512."""
    block = 512
    return block + -(-(128 + tokens * dim * itemsize) // block) * block


def checkpoint_bytes(rank: States, ranks: int) -> int:
    """Bytes of all ranks' masters, averages and moments; manifest and headers are less than a thousandth of that."""
    return ranks * (rank.master + rank.ema + rank.moments)
