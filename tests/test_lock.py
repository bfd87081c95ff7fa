"""The lock of a run_dir: a second training waits, then ends in one line; a killed one releases the lock."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainings import make_data, start
from train.faults.run_lock import InUse, lock_run_dir

OWNER = """
import os, sys, time
from pathlib import Path
from train.faults.run_lock import lock_run_dir
lock_run_dir(Path(sys.argv[1]))
if os.fork():
    print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(repo, tmp_path):
    """A process that has locked the run_dir, with a child that outlives it, as loader workers may."""
    program = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(repo)},
                          start_new_session=True) as process:  # fmt: skip
        try:
            assert process.stdout and process.stdout.readline() == "locked\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_training_is_refused_until_the_first_is_killed(owner, tmp_path, capsys):
    with pytest.raises(InUse, match=rf"another training uses run_dir=.*\(process {owner.pid} on .*\): wait for"):
        lock_run_dir(tmp_path, wait=0.3)
    assert capsys.readouterr().err.count("waiting up to") == 1
    owner.kill()
    lock_run_dir(tmp_path, wait=5)
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock_run_dir(tmp_path, wait=0)
    assert (tmp_path / "lock").read_text() == "", "the file must not name an owner"


def test_a_training_waits_for_the_one_before_it(repo, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open(run_dir / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = start(repo, make_data(tmp_path / "data"), run_dir, "steps=3")
        assert process.stderr
        for line in process.stderr:
            if "waiting up to 120 s for unknown process to release run_dir=" in line:
                break
        else:
            pytest.fail("it did not wait")
        assert not Path(run_dir / "metrics.jsonl").exists()
    assert process.wait(300) == 0, process.communicate()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
