"""What the machine has, and which parts fall away for what it lacks."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.gpu_check.check import LEFT_OUT, MEASURED, Check, Row, missing, needs_gpu

# The package to install, the module that it brings, and what falls away without it.
PACKAGES = (
    ("numpy", "numpy", "all parts"),
    ("omegaconf", "omegaconf", "all parts"),
    ("safetensors", "safetensors", "all parts"),
    ("triton", "triton", "what is compiled: fewbit_recompute, overlap, half of speed"),
    ("diffusers", "diffusers", "parity with it, and its speed"),
    ("transformers", "transformers", "diffusers' nets, in some of its versions"),
    ("deepspeed", "deepspeed", "the project's own engine in resume, syncs and memory; torch's AdamW takes its place"),
    ("bitsandbytes", "bitsandbytes", "the project's own engine, as without deepspeed"),
)


def run(check: Check) -> Iterator[Row]:
    """Rows of the card, its driver, and each package."""
    yield Row("Python", MEASURED, f"{platform.python_version()} on {platform.machine()}")
    yield Row(
        "torch", MEASURED, f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )
    if check.on_gpu:
        card = torch.cuda.get_device_properties(0)
        text = (
            f"{card.name}, {card.total_memory / 1e9:.1f} GB, {card.multi_processor_count} multiprocessors, "
            f"compute capability {card.major}.{card.minor}, driver {driver()}"
        )
        yield Row("card", MEASURED, text, {"name": card.name, "memory": card.total_memory, "driver": driver()})
    else:
        yield needs_gpu("card", "its name, memory and driver")
    for package, module, falls_away in PACKAGES:
        if missing(module):
            result = LEFT_OUT if check.on_gpu or package != "triton" else MEASURED
            yield Row(package, result, f"missing; without it falls away: {falls_away}")
        else:
            yield Row(package, MEASURED, installed(package))
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler:
        yield Row("C compiler", MEASURED, "found")
    else:
        yield Row("C compiler", LEFT_OUT, "missing; Triton needs one to start its kernels: nothing can be compiled")


def installed(package: str) -> str:
    """The version of a package, as its metadata says."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "there, of an unknown version"


def driver() -> str:
    """The version of NVIDIA's driver, or 'unknown'."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[0] if lines else "unknown"
