"""Ctrl-C at several moments, with real processes and real signals: one line at once, no traceback."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data import interrupt
from data.cli import REQUEUE
from tests.support.terminal import Terminal
from tests.support.trainings import make_data, start
from train.checkpoint.format import complete_checkpoints

STOPPED = "stopped by Ctrl-C\n"
FINISHES = "Ctrl-C: this step or the next is the last and is saved; press again to end at once, without saving\n"


def catch_ctrl_c() -> None:
    """For the child, before it runs its program: what a shell starts in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for_library(process: subprocess.Popen, name: str) -> None:
    """Until the process has loaded a library: it is importing then, and goes on importing for a while."""
    while name not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)


def wait_for_words(process: subprocess.Popen, words: str) -> str:
    """Until the process has said the words on stderr; returns what it said."""
    assert process.stderr is not None
    said = ""
    while words not in said:
        read = process.stderr.read(1)
        assert read, said
        said += read
    return said


@pytest.mark.parametrize(
    ("arguments", "library"),
    [
        (["-m", "data.inspect", "shards=absent", "out=x.html"], "_multiarray_umath"),  # imported by the page itself
        (["-m", "train.sample", "checkpoint=absent"], "libtorch_python"),  # imported by the action
        (["-m", "launch.plan", "+experiment=if_i_m"], "libtorch_python"),
        (["train/main.py", "+experiment=smoke", "dry_run=true"], "libtorch_python"),
    ],
)
@pytest.mark.parametrize("presses", [1, 2])
def test_a_command_that_is_importing_stops_in_one_line(repo, arguments, library, presses):
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=catch_ctrl_c,
    )  # fmt: skip
    wait_for_library(process, library)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", STOPPED)


def test_what_a_command_began_is_cleaned_up_and_a_second_press_ends_it_at_once(tmp_path, repo):
    program = f"""
import sys, time
sys.argv[0] = "-m"
import data
from dataclasses import dataclass
from data.cli import command
from data.storage.atomic import atomic_folder
@dataclass
class Nothing:
    "Does nothing."
def act(args):
    with atomic_folder({str(tmp_path / "made")!r}):
        try:
            print("begun", file=sys.stderr, flush=True)
            time.sleep(600)
        finally:
            if STUCK:
                print("cleans up", file=sys.stderr, flush=True)
                time.sleep(600)
command(act, Nothing, [])
"""
    for stuck in (False, True):
        process = subprocess.Popen(
            [sys.executable, "-c", program.replace("STUCK", str(stuck))], cwd=repo, stderr=subprocess.PIPE, text=True,
            preexec_fn=catch_ctrl_c,
        )  # fmt: skip
        wait_for_words(process, "begun\n")
        process.send_signal(signal.SIGINT)
        if stuck:
            assert wait_for_words(process, "cleans up\n") == f"{STOPPED}cleans up\n"
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == ("" if stuck else STOPPED)
        assert process.returncode == 130 and (stuck or not os.listdir(tmp_path))


def test_only_the_first_rank_tells(monkeypatch, capfd):
    monkeypatch.setitem(interrupt._state, "told", False)
    monkeypatch.setenv("RANK", "1")
    interrupt.tell_interrupted()
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


# A step of so many micro batches takes long enough to press twice in it.
LONG_STEP = ("global_batch=1600", "data.streams=4", "wandb.mode=disabled")


def test_a_training_saves_after_one_press_and_ends_at_once_after_two(repo, data, tmp_path):
    seldom = ("steps=5000", "log_every=3", "save_every=5000")
    given = (repo, data, tmp_path / "run", "global_batch=16", "wandb.mode=disabled", *seldom)
    terminal = Terminal(partial(start, *given))
    terminal.wait_for("3/5000")
    terminal.press_ctrl_c()
    assert terminal.end() == REQUEUE, terminal.said
    *before, told, bar, curves, checkpoint, cursor = terminal.screen()
    assert f"{told}\n" == FINISHES and cursor == "", terminal.screen()
    assert bar.startswith("run:   0%|") and "loss=" in bar and all(line.startswith("run:   0%|") for line in before)
    assert curves.startswith("curves ") and checkpoint.startswith("checkpoint ")
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert f" {int(saved.name.removeprefix('step-'))}/5000 " in bar, "a stop between two lines of metrics"
    terminal = Terminal(partial(start, repo, data, tmp_path / "twice", *LONG_STEP))
    terminal.wait_for("0/6")
    terminal.press_ctrl_c()
    terminal.wait_for(FINISHES.strip())
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    bar, told, *_, again, cursor = terminal.screen()
    assert bar.startswith("twice:   0%|") and f"{told}\n" == FINISHES, terminal.screen()
    assert (again, cursor) == ("stopped at once by Ctrl-C; the checkpoints before are whole", "")


def test_ctrl_c_to_the_launcher_and_two_ranks_saves(repo, data, tmp_path):
    """A terminal sends it to all. The traceback of deepspeed's own front end is beyond us; the ranks say one line."""
    process = start(
        repo, data, tmp_path / "run", "global_batch=16", "steps=5000", "wandb.mode=disabled", ranks=2,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert said.count(FINISHES) == 1 and said.count("Traceback") <= 1, said
    assert "train/" not in said.partition("Traceback")[2]
    assert len(complete_checkpoints(tmp_path / "run")) == 1
