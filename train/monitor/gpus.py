"""The GPUs that the plan and the MFU know, from their makers' data sheets."""

from dataclasses import dataclass

from data.checks import check_choice

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """One card.

    device: CUDA's name for it, without the "NVIDIA " in front that newer drivers add.
    tflops: dense bf16 matrix products with fp32 sums, in 10^12 FLOP/s, without sparsity.
    memory: bytes that are free in an idle card, to within a hundredth.  memory_rate: bytes/s of that memory.
    link_rate: bytes/s to the other GPUs of its node, one way.
    """

    device: str
    tflops: float
    memory: int
    memory_rate: float
    link_rate: float


# Source: NVIDIA's data sheets of A100 (2021), A10 (2021), A10G (AWS, 2022), L4 (2023), L40S (2023), H100 (2024), H200
# (2024) and HGX B200 (2024), the GA102 white paper for the RTX 3090 and the Ada white paper for the RTX 4090. A data
# sheet's GB of memory are GiB. Of GDDR memory with ECC, as A10, A10G, L4 and L40S have it, 15/16 is left. Cards without
# NVLink to all others of their node reach them by PCIe, of 16 lanes. A V100 has no bf16 products.
GPUS = {
    "a100-40g": GPU("A100-SXM4-40GB", 312, 40 * GIB, 1.555e12, 300e9),
    "a100-80g": GPU("A100-SXM4-80GB", 312, 80 * GIB, 2.039e12, 300e9),
    "a100-pcie-40g": GPU("A100-PCIE-40GB", 312, 40 * GIB, 1.555e12, 32e9),
    "a100-pcie-80g": GPU("A100 80GB PCIe", 312, 80 * GIB, 1.935e12, 32e9),
    "h100-80g": GPU("H100 80GB HBM3", 989.4, 80 * GIB, 3.35e12, 450e9),
    "h100-pcie-80g": GPU("H100 PCIe", 756, 80 * GIB, 2.0e12, 64e9),
    "h100-nvl-94g": GPU("H100 NVL", 835.5, 94 * GIB, 3.9e12, 64e9),
    "h200-141g": GPU("H200", 989.4, 141 * GIB, 4.8e12, 450e9),
    "b200-180g": GPU("B200", 2250, 180 * GIB, 8.0e12, 900e9),
    "l40s-48g": GPU("L40S", 362, 45 * GIB, 0.864e12, 32e9),
    "l4-24g": GPU("L4", 121, int(22.5 * GIB), 0.3e12, 32e9),
    "a10-24g": GPU("A10", 125, int(22.5 * GIB), 0.6e12, 32e9),
    "a10g-24g": GPU("A10G", 70, int(22.5 * GIB), 0.6e12, 32e9),
    "rtx3090-24g": GPU("GeForce RTX 3090", 71, 24 * GIB, 0.936e12, 32e9),
    "rtx4090-24g": GPU("GeForce RTX 4090", 165.2, 24 * GIB, 1.008e12, 32e9),
}

# Rates of a whole node's link in Gbit/s: Ethernet of 25 and 100; one HDR InfiniBand port, two, four, and eight as in a
# DGX A100.
NODE_LINKS = (25, 100, 200, 400, 800, 1600)

# The share of its peak that a card is assumed to reach in forward and backward, until `make gpu-check` has measured it.
ASSUMED_MFU = 0.4


def find_gpu(name: str) -> GPU:
    """The GPU of a name in GPUS.

    Raises: ValueError for an unknown name.
    """
    check_choice("gpu", name, GPUS)
    return GPUS[name]


def find_device(device_name: str) -> GPU | None:
    """The GPU that CUDA calls so, None if GPUS does not have it; the whole name must agree."""
    device_name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if gpu.device == device_name), None)
