"""The batch script on a real Slurm of two nodes on this machine: warned, requeued, resumed, finished."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster, install
from tests.support.trainings import SMALL, make_data, metrics
from train.checkpoint.format import latest_checkpoint, read_manifest

pytestmark = pytest.mark.slow
STEPS = 30
# Long enough that the warning comes in its middle: a step takes some tenths of a second.
FIRST = [*(o for o in SMALL if not o.startswith("steps=")), f"steps={STEPS}", "save_every=1000", "wandb.mode=disabled"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    install()
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        launcher = Path(sys.executable).parent
        cluster.environment |= {
            "PATH": f"{launcher}{os.pathsep}{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def submit(
    cluster: Cluster, repo: Path, log: Path, *overrides: str, options: tuple[str, ...] = (), **environment
) -> str:
    small = ["--nodes=2", "--gpus-per-node=1", "--time=20", "--exclusive=user", f"--output={log}"]
    command = ["sbatch", "--parsable", *small, *options, "launch/slurm/train.sbatch", *overrides]
    with_more = cluster.environment | environment
    done = subprocess.run(command, cwd=repo, env=with_more, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_until(ready, what: str, log: Path, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            output = "\n".join(p.read_text()[-3000:] for p in [log, *log.parent.rglob("train-*.log")] if p.exists())
            raise AssertionError(f"{what}: not within {seconds:g} s\n{output}")
        time.sleep(0.3)


def steps_made(run_dir: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return metrics(run_dir)[-1]["step"]
    return 0


def test_warned_requeued_resumed_finished(cluster, repo, data, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    overrides = [*FIRST, f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    job = submit(cluster, repo, log, *overrides)
    wait_until(lambda: steps_made(run_dir) >= 3, "three steps", log)
    # What Slurm itself does at --signal=B:USR1@N: to the batch script alone.
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    wait_until(
        lambda: latest_checkpoint(run_dir) and cluster.state(job) != "RUNNING", "the end of the first start", log
    )
    stopped_at = read_manifest(latest_checkpoint(run_dir))["step"]
    assert 3 <= stopped_at < STEPS and not (run_dir / "done").exists()
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", log)

    output = log.read_text()
    assert cluster.state(job) == "COMPLETED", output[-3000:]
    assert (run_dir / "done").exists() and steps_made(run_dir) == STEPS
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1)), "each step once, none lost"
    assert output.count("asked to save and leave") == 1 and f"stopped at step {stopped_at} as asked: requeued" in output
    assert "finished: RUN_DIR/done exists" in output
    assert read_manifest(latest_checkpoint(run_dir))["ranks"] == 2
    assert {p.name for p in (run_dir / "logs").glob("train-*.log")} == {f"train-{job}-node{i}.log" for i in (1, 2)}
    assert output.count("preflight: 2 nodes") == 1, "only before the first start"


def test_a_mistake_is_reported_and_not_requeued(cluster, repo, data, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(cluster, repo, log, *FIRST, f"run_dir={run_dir}", "data.shards=nowhere", PREFLIGHT="0")
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", log)
    assert cluster.state(job) == "FAILED"
    assert "not requeued" in log.read_text()
    assert "/nowhere': check the path, or make shards with" in "".join(
        p.read_text() for p in (run_dir / "logs").glob("train-*.log")
    )


@pytest.mark.parametrize(
    ("options", "environment", "overrides", "message"),
    [
        (("--array=0-1",), {}, (), "of an array"),
        ((), {"MASTER_ADDR": "elsewhere"}, (), "unset it, it is of another job"),
        ((), {"MASTER_PORT": "taken"}, (), "is taken on"),
        ((), {"HOSTFILE": "hosts"}, (), "disagrees with Slurm"),
        ((), {"RANKS_PER_NODE": "3"}, (), "no micro_batch fits 6 ranks"),
        ((), {}, ("micro_bath=3",), "micro_bath"),
    ],
)
def test_what_cannot_work_ends_in_one_line(cluster, repo, tmp_path, options, environment, overrides, message):
    log, hosts = tmp_path / "job.log", tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode9 slots=1\n")
    if "HOSTFILE" in environment:
        environment = {"HOSTFILE": str(hosts)}
    if "MASTER_PORT" in environment:
        environment = {"MASTER_PORT": cluster.conf.read_text().partition("SlurmctldPort=")[2].split()[0]}
    job = submit(cluster, repo, log, *FIRST, f"run_dir={tmp_path}/run", *overrides, options=options, **environment)
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", log, 60)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert lines and all(message in line for line in lines), log.read_text()


def test_the_command_of_the_model_card_in_an_allocation(cluster, repo, data, tmp_path):
    run_dir = tmp_path / "run"
    line = ["deepspeed", "train/main.py", *(o for o in FIRST if o != f"steps={STEPS}"), "steps=4", f"run_dir={run_dir}"]
    line += [f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    environment = cluster.environment | {"PREFLIGHT": "0"}
    environment["PATH"] = f"{repo / 'launch/slurm/bin'}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["salloc", "--nodes=2", "--gpus-per-node=1", "--exclusive=user", *line],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(latest_checkpoint(run_dir))["ranks"] == 2 and (run_dir / "done").exists()


def test_a_missing_partition(cluster, repo):
    command = ["sbatch", "--partition=gpu", "--nodes=2", "launch/slurm/train.sbatch"]
    done = subprocess.run(command, cwd=repo, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode and "invalid partition" in done.stderr
