"""What goes through the network and into files: gradients and weights, images and embeddings, checkpoints."""

from dataclasses import dataclass

from train.monitor.gpus import GPU
from train.monitor.memory import States, partition


@dataclass(frozen=True, slots=True)
class Collectives:
    """Bytes of the collectives of one step.

    reduced, gathered: of the tensors, gradients and weights, that every rank reduces and gathers.
    sent: by each GPU for them, around a ring of all GPUs.
    """

    reduced: int
    gathered: int
    sent: float

    def seconds(self, gpu: GPU, nodes: int, gpus_per_node: int, node_link: float, efficiency: float) -> float:
        """Seconds of the collectives; every byte that goes around the ring passes each node's link once.

        node_link: bytes/s each way.  efficiency: share of a link's rate that collectives reach.
        """
        rates = [gpu.link_rate] * (gpus_per_node > 1) + [node_link] * (nodes > 1)
        return self.sent / (min(rates) * efficiency) if rates else 0.0


def collectives(trained: int, ranks: int, weight_bytes: int) -> Collectives:
    """DeepSpeed's ZeRO-1 all-reduces every gradient, once a step, then gathers the weights."""
    reduced = weight_bytes * trained
    gathered = weight_bytes * partition(trained, ranks) * ranks
    return Collectives(reduced, gathered, (2 * reduced + gathered) * (ranks - 1) / ranks)


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
    """Bytes of all ranks' masters, EMA and moments; manifest and headers are less than a thousandth of that."""
    return ranks * (rank.master + rank.ema + rank.moments)
