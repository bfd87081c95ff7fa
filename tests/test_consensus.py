"""A signal to one rank stops all ranks in the same step: the one in which it comes, or the next."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.cli import REQUEUE
from tests.chaos import Run, last_step
from tests.support.trainings import make_data
from train.checkpoint.format import complete_checkpoints, step_of
from train.faults.preempt import SIGNALS


def assert_one_stops_all(repo: Path, folder: Path, ranks: int, draw: random.Random) -> None:
    """Start ranks that ask one another, send a signal to one of them at a random moment, and look at all of them."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.support.asking_ranks"]
    started = [
        subprocess.Popen([*command, str(rank), str(ranks), str(folder)], cwd=repo, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        while not all((folder / f"ready-{rank}").exists() for rank in range(ranks)):
            assert all(process.poll() is None for process in started), [p.communicate()[1] for p in started]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        victim = draw.randrange(ranks)
        started[victim].send_signal(draw.choice(SIGNALS))
        for process in started:
            assert process.wait(timeout=60) == 0, process.communicate()[1]
    finally:
        for process in started:
            process.kill()
    found = [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]
    # The one that got it asks with it in that step, or in the next; all stop in the step of the question.
    raised, asked = found[victim]["raised"], found[victim]["asked"]
    assert raised <= asked <= raised + 1
    assert {rank["stopped"] for rank in found} == {asked}


def test_a_signal_to_one_of_two_ranks_stops_both_in_one_step(repo, tmp_path):
    assert_one_stops_all(repo, tmp_path / "ranks", 2, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_signals_at_random_moments_stop_all_ranks_in_one_step(repo, tmp_path, ranks):
    draw = random.Random(ranks)
    for number in range(5):
        assert_one_stops_all(repo, tmp_path / str(number), ranks, draw)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_signals_at_random_moments_stop_trainings_whole(tmp_path, ranks):
    """Also while a checkpoint is being written, whose progress the ranks ask for together with it."""
    draw, data, run_dir = random.Random(ranks), make_data(tmp_path / "data"), tmp_path / "run"
    stops = []
    for _ in range(2):
        run = Run(data, run_dir, "steps=5000", f"global_batch={4 * ranks}", ranks=ranks)
        run.wait_for(draw.randrange(1, 6))
        time.sleep(draw.uniform(0, 0.5))
        tree = run.tree()
        draw.choice(run.ranks()).send_signal(draw.choice(SIGNALS))
        assert run.end(tree) == REQUEUE, run.said()[-3000:]
        stops.append(step_of(complete_checkpoints(run_dir)[-1]))
        assert last_step(run_dir) == stops[-1] and "Traceback" not in run.said()
    assert stops == sorted(set(stops))
