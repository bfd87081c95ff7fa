"""Signals to real trainings: the step is finished and saved, the status says `requeue`, the next start goes on."""

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.trainings import make_data, metrics, start
from train.checkpoint import complete
from train.preempt import REQUEUE

QUIET = "wandb.mode=disabled"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def ranks_of(pid: int) -> list[psutil.Process]:
    """The training processes below a launcher, without their loader workers."""
    found = [p for p in psutil.Process(pid).children(recursive=True) if "RANK" in p.environ()]
    return [p for p in found if p.ppid() not in {other.pid for other in found} and "train/main.py" in p.cmdline()[2]]


def wait_for_step(run_dir: Path, step: int) -> None:
    until = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_text().count("\n") < step:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("to", ["one rank", "all processes", "the launcher"])
def test_a_signal_ends_the_run_saved_and_to_be_requeued(repo, data, tmp_path, to):
    number = signal.SIGUSR1 if to == "one rank" else signal.SIGTERM
    run = start(repo, data, tmp_path / "run", "wandb.mode=offline", "steps=400", "save_every=1000", ranks=2)
    wait_for_step(tmp_path / "run", 2)
    tree = psutil.Process(run.pid).children(recursive=True)
    if to == "one rank":
        ranks_of(run.pid)[1].send_signal(number)
    elif to == "all processes":
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    else:
        tree[0].send_signal(number)
    out, err = run.communicate(timeout=100)
    assert run.returncode == REQUEUE, out[-2000:] + err[-3000:]
    saved = complete(tmp_path / "run")
    assert len(saved) == 1, err[-3000:]
    assert not (tmp_path / "run/done").exists()
    psutil.wait_procs(tree, timeout=10)
    assert not [p for p in tree if p.is_running()]
    lines = metrics(tmp_path / "run")
    assert f"step-{lines[-1]['step']:08d}" == saved[0].name
