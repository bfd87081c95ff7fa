"""The checks before an install: each obstacle is one line that names the remedy."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from launch.check_machine import driver_note, python_fault


def check(repo: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "launch" / "check_machine.py")]
    done = subprocess.run(command, cwd=repo, env={**os.environ, **env}, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_a_machine_that_runs_the_tests_passes(repo):
    done = check(repo, NEEDED_GB="0.001")
    assert (done.returncode, done.stderr) == (0, "")


def test_little_disk(repo):
    line = one_line(check(repo, NEEDED_GB="1e9"))
    assert "GB free in" in line
    assert "make NEEDED_GB=4" in line


def test_other_pythons():
    assert python_fault() is None
    for version in [(3, 9), (3, 12), (2, 7)]:
        assert "Python 3.10 or 3.11 is needed" in python_fault(version)


def test_an_old_driver_is_noted(tmp_path):
    path = tmp_path / "version"
    assert driver_note(path) is None
    for driver, old in (("535.104.05", True), ("580.65.06", False)):
        path.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19 01:15:15 UTC 2023")
        note = driver_note(path)
        assert (note is not None) == old
    path.write_text("in another form")
    assert driver_note(path) is None


def test_make_passes_over_a_python_that_does_not_run(repo, tmp_path):
    script(tmp_path / "python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    script(tmp_path / "python3.10", f'exec "{sys.executable}" "$@"')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["make", "help"], cwd=repo, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(found: python3.10)" in done.stdout


def test_make_says_when_the_named_python_does_not_run(repo, tmp_path):
    # A copy of the Makefile, where no .venv stands in the way.
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((repo / name).read_bytes())
    done = subprocess.run(["make", "install", "PYTHON=python9"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "'python9' does not run; install Python 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()
