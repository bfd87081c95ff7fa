"""What GPUs can do at most, from their makers' data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """tflops: dense bf16 matmul, without sparsity.  memory: bytes.  memory_rate, link_rate: bytes/s of its memory, and
    to the other GPUs of the node, one way.
    """

    tflops: float
    memory: int
    memory_rate: float
    link_rate: float


# NVIDIA's data sheets: A100 (2021), H100 and H200 SXM (2024), L40S (2023), GeForce RTX 3090 and 4090 (dense bf16 with
# fp32 sums).
GPUS = {
    "a100-40g": GPU(312, 40 * GIB, 1.555e12, 300e9),
    "a100-80g": GPU(312, 80 * GIB, 2.039e12, 300e9),
    "h100-80g": GPU(989.4, 80 * GIB, 3.35e12, 450e9),
    "h200-141g": GPU(989.4, 141 * 10**9, 4.8e12, 450e9),
    "l40s-48g": GPU(362, 48 * GIB, 0.864e12, 32e9),
    "rtx3090-24g": GPU(71, 24 * GIB, 0.936e12, 32e9),
    "rtx4090-24g": GPU(165.2, 24 * GIB, 1.008e12, 32e9),
}

# Of a whole node, in Gbit/s: Ethernet of 25 and 100, one HDR InfiniBand port, two, four, and eight as in a DGX A100.
NODE_LINKS = (25, 100, 200, 400, 800, 1600)


def find_gpu(name: str) -> GPU:
    """The GPU of that name.

    Raises: ValueError for an unknown one.
    """
    if name not in GPUS:
        raise ValueError(f"gpu={name} is not known; there are {', '.join(GPUS)} (train/monitor/gpus.py)")
    return GPUS[name]
