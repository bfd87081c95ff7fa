"""What may take longer than hang_seconds does, and the run goes on; a node whose rank died ends; small limits."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.trainings import make_data, start
from train.checkpoint.format import latest_checkpoint, step_of

SUPPORT = Path(__file__).resolve().parent / "support"
QUIET = ("wandb.mode=disabled", "steps=3", "optim.warmup_steps=2", "save_every=3", "hang_seconds=10")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def run_slowly(repo: Path, data: Path, run_dir: Path, what: str, seconds: float) -> tuple[int, str]:
    """Exit status and output of a training by slow_run.py."""
    run = start(repo, data, run_dir, *QUIET, ranks=2, script=SUPPORT / "slow_run.py", before=(what, str(seconds)))
    out, err = run.communicate(timeout=200)
    return run.returncode, out + err


@pytest.mark.slow
def test_what_may_take_longer_than_the_limit_does(repo, data, tmp_path):
    # 2.5 s for each of six denoising steps, 15 s for a file or for the first micro batch: the limit is 10 s.
    status, said = run_slowly(repo, data, tmp_path / "sample", "sample", 2.5)
    assert status == 0 and "HANGS" not in said, said[-3000:]
    (groups,) = re.findall(r"(\d+) groups wait \[80\.0\] s", said)
    assert int(groups) > 2, "the world's, the consensus's and DeepSpeed's own"
    status, said = run_slowly(repo, data, tmp_path / "save", "save", 15)
    assert status == 0 and "HANGS" not in said, said[-3000:]
    assert step_of(latest_checkpoint(tmp_path / "save")) == 3
    status, said = run_slowly(repo, data, tmp_path / "first", "first", 15)
    assert status == 0 and "HANGS" not in said, said[-3000:]
    pictures = [np.asarray(Image.open(next((tmp_path / of / "samples").glob("*.png")))) for of in ("sample", "save")]
    assert np.array_equal(*pictures), "the grid is the same, told to the others or not"


LAUNCHER = """
import os, subprocess, sys
ranks = []
for rank in range(3):
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_SIZE": "3"}
    ranks.append(subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment))
print([rank.wait() for rank in ranks])
"""


ORPHAN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
from train.faults.node_watch import NodeWatch
NodeWatch()
print("ready", flush=True)
time.sleep(60)
"""
DYING_LAUNCHER = """
import os, subprocess, sys
environment = os.environ | {"RANK": "3"} | ({"LOCAL_SIZE": "1"} if sys.argv[2] == "launcher" else {})
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("parent", ["launcher", "shell"])
def test_a_rank_whose_launcher_died_stops_as_by_sigterm(repo, tmp_path, parent):
    """A shell that ends leaves what it started in the background alone."""
    with open(tmp_path / "said", "w") as said:
        launched = subprocess.run(
            [sys.executable, "-c", DYING_LAUNCHER, ORPHAN, parent], cwd=repo, stdout=subprocess.PIPE, stderr=said,
            text=True, timeout=60,
        )  # fmt: skip
    rank = psutil.Process(int(launched.stdout))
    if parent == "launcher":
        psutil.wait_procs([rank], timeout=20)
        assert (tmp_path / "said").read_text() == "rank 3: its launcher is gone, so the run stops as by SIGTERM\n"
    else:
        time.sleep(2)
        assert rank.is_running() and not (tmp_path / "said").read_text()
        rank.kill()


def test_a_node_whose_rank_died_ends_its_other_ranks_though_they_hang():
    """By a launcher that ends nobody. The second rank holds the interpreter's lock, so the first one must end it."""
    program = [sys.executable, "-c", LAUNCHER, str(SUPPORT / "hanging_rank.py"), "lock", "watch"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1, -9, 1]\n", done.stderr
    own, _, others = done.stderr.partition("RuntimeError: this rank's own error")
    assert "ends because" not in own
    assert others.strip() == "rank 0 ends because another rank of its node is gone; see that rank's own error above"
