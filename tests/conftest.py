"""What every test may use: the repository's root, the folder of real data, one thread each."""

import os
from collections.abc import Iterator

# Before torch is imported: its thread pools are made then, and two cores are shared by ranks and by other tests.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests are of the CPU's path, on machines with a GPU too; what needs a GPU is in tests/gpu_check.
os.environ["DS_ACCELERATOR"] = "cpu"

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from tests.support.hub_server import Hub

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
# The files that take longest: begun last, one of them would run alone at the end.
LONGEST_FIRST = (
    "test_train.py", "test_faults.py", "test_train_ends.py", "test_scale.py", "test_preflight.py", "test_recompute.py",
    "test_overlap.py", "test_evaluate.py", "test_resume.py", "test_wrong_sidecars.py", "test_plan.py",
    "test_finetune.py", "test_interrupt.py", "test_lock.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within a file the tests stay as they are."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["Hub"]:
    """A hub on loopback, the only one that huggingface_hub knows in this test, with an empty cache and no token."""
    from huggingface_hub import constants

    from tests.support.hub_server import served

    with served() as hub:
        for name, value in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
