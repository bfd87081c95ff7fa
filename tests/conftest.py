"""What every test may use: the repository's root, the folder of real data, one thread each."""

import os
from collections.abc import Iterator

# Before torch is imported: its thread pools are made then, and two cores are shared by ranks and by other tests.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests are of the CPU's path, on machines with a GPU too; what needs a GPU is in tests/gpu_check.
os.environ["DS_ACCELERATOR"] = "cpu"

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("IF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder}; name one in IF_SHARED")
    return folder


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """End the process group, and the environment of a rank, that a command which ran in this process has left."""
    began_in_group, environment = dist.is_initialized(), dict(os.environ)
    yield
    if dist.is_initialized() and not began_in_group:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
