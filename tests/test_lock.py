"""Two trainings in one run_dir: the second waits, then ends in one line; a killed one leaves nothing behind."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainings import make_data, start
from train.faults.run_lock import InUse, lock_run_dir

HOLDER = """
import os, sys, time
from pathlib import Path
from train.lock import lock_run_dir
lock_run_dir(Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(repo, tmp_path):
    """A process that holds the run_dir's lock, and a child of it that outlives it, as loader workers may."""
    program = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(repo)},
                          start_new_session=True) as process:  # fmt: skip
        try:
            assert process.stdout and process.stdout.readline() == "held\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_one_at_a_time_and_free_when_killed(holder, tmp_path, capsys):
    with pytest.raises(InUse, match=rf"another training is at run_dir=.*\(process {holder.pid} on .*\): wait for"):
        lock_run_dir(tmp_path, wait=0.3)
    assert capsys.readouterr().err.count("waiting up to") == 1
    holder.kill()
    lock_run_dir(tmp_path, wait=5)
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_without_locks_it_goes_on(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock_run_dir(tmp_path, wait=0)
    assert (tmp_path / "lock").read_text() == "", "it does not say that it holds what it cannot hold"


def test_a_training_waits_for_the_one_before_it(repo, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open(run_dir / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = start(repo, make_data(tmp_path / "data"), run_dir, "steps=3")
        assert process.stderr
        for line in process.stderr:
            if "waiting up to 120 s for unknown to leave run_dir=" in line:
                break
        else:
            pytest.fail("it did not wait")
        assert not Path(run_dir / "metrics.jsonl").exists()
    assert process.wait(300) == 0, process.communicate()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
