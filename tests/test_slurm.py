"""The batch script on a real Slurm of three nodes on this machine: warned, requeued, started in place, finished."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from data.device import find_machine
from tests.support.slurm_cluster import Cluster, install
from tests.support.trainings import SMALL, make_data, metrics
from train.checkpoint.format import latest_checkpoint, read_manifest
from train.faults.quarantine import read_node_faults, record_node_fault

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
    cluster: Cluster, repo: Path, log: Path, *overrides: str, options: tuple[str, ...] = (), **environment: str | None
) -> str:
    small = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2", "--time=20", "--exclusive=user", f"--output={log}"]
    command = ["sbatch", "--parsable", *small, *options, "launch/slurm/train.sbatch", *overrides]
    with_more = {name: value for name, value in (cluster.environment | environment).items() if value is not None}
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


def ranks_of(run_dir: Path) -> dict[int, psutil.Process]:
    """The processes of a training by rank."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if f"run_dir={run_dir}" not in words or words[2] != "train/main.py":
                continue
            # The parent of a loader worker is a rank itself.
            if (parent := process.parent()) and parent.cmdline()[2:3] != ["train/main.py"]:
                found[int(process.environ()["RANK"])] = process
    return found


def test_started_again_in_place_with_a_spare_node(cluster, repo, data, tmp_path):
    """A node goes down, later a rank dies: no requeue, the spare takes over, and each step is made as without them."""
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    given = [*(o for o in FIRST if not o.startswith("save_every")), "save_every=2", "keep_checkpoints=100"]
    given += [f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    job = submit(cluster, repo, log, *given, options=("--nodes=3",), SPARES="1", PREFLIGHT="0")
    try:
        wait_until(lambda: steps_made(run_dir) >= 4 and latest_checkpoint(run_dir), "a checkpoint", log, 600)
        cluster.command("scontrol", "update", "nodename=node2", "state=down", "reason=test")
        wait_until(lambda: "in place without node2, with node3, from step" in log.read_text(), "the spare", log, 300)
        there = steps_made(run_dir)
        wait_until(lambda: steps_made(run_dir) >= there + 3, "steps of the second start", log, 600)
        ranks_of(run_dir)[1].kill()
        wait_until(lambda: log.read_text().count("starts again in place") == 2, "the third start", log, 300)
        wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end", log, 600)
    finally:
        cluster.command("scancel", job, check=False)
        wait_until(lambda: cluster.state(job) not in ("RUNNING", "COMPLETING"), "a free node", log)
        cluster.command("scontrol", "update", "nodename=node2", "state=resume", check=False)
    output = log.read_text()
    assert cluster.state(job) == "COMPLETED", output[-3000:]
    assert "Restarts=0" in cluster.command("scontrol", "show", "job", job) and "requeued" not in output
    assert output.count("train: 2 nodes x 1") == 3
    assert "first on node3: starts again in place, from step" in output, "no other node is left"
    # On cores that are shared one of them may be called slow as well.
    deaths = {node: faults["death"]["times"] for node, faults in read_node_faults(run_dir).items() if "death" in faults}
    assert deaths == {"node2": 1, "node3": 1}
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1)), "each step once, none lost"
    assert read_manifest(latest_checkpoint(run_dir))["ranks"] == 2


@pytest.mark.parametrize(("kind", "times"), [("straggler", 3), ("corruption", 1)])
def test_a_node_that_failed_too_often_or_computed_wrongly_is_left_out(cluster, repo, data, tmp_path, kind, times):
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    run_dir.mkdir()
    for number in range(times):
        record_node_fault(run_dir, "node1", kind, f"fault {number}")
    overrides = [
        *FIRST,
        f"run_dir={run_dir}",
        f"data.shards={data / 'shards'}",
        f"data.text={data / 'text'}",
        "steps=3",
    ]
    options = ("--nodes=1",)
    blocker = submit_sleep(cluster, "node2")
    job = submit(cluster, repo, log, *{o.split("=")[0]: o for o in overrides}.values(), options=options, PREFLIGHT="0")
    wait_until(lambda: "requeued without node1" in (log.read_text() if log.exists() else ""), "the requeueing", log, 60)
    cluster.command("scancel", blocker)
    trained = run_dir / "logs" / f"train-{job}-node2.log"
    wait_until(trained.exists, "the start on the other node", log, 120)
    cluster.command("scancel", job)
    output = log.read_text()
    assert f"node1 is left out: {kind} {times} x (fault {times - 1}); MAX_NODE_FAULTS=3" in output
    assert list((run_dir / "logs").glob("train-*.log")) == [trained]


def submit_sleep(cluster: Cluster, node: str) -> str:
    """A job that has a node to itself."""
    options = ["--parsable", "--output=/dev/null", f"--nodelist={node}", "--exclusive"]
    job = cluster.command("sbatch", *options, "--wrap=sleep 300").strip()
    wait_until(lambda: cluster.state(job) == "RUNNING", "the other job", Path("/dev/null"), 60)
    return job


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


# Prints what a rank sees, one line in the log of its node.
SHOW = """
import json, os
names = ("RANK", "CUDA_VISIBLE_DEVICES", "FROM_SRUN_ARGS")
print("seen", json.dumps([*map(os.environ.get, names), len(os.sched_getaffinity(0))]))
"""
RUN_SHOW = """
import os, pathlib, sys
from launch.slurm.allocation import find_allocation
from launch.slurm.batch import Job, split_srun_args
folder, allocation = pathlib.Path(sys.argv[1]), find_allocation()
(folder / "hosts").write_text(allocation.hostfile())
sys.exit(Job(allocation, folder / "hosts", folder, split_srun_args(os.environ["SRUN_ARGS"])).run("show", sys.argv[2]))
"""


def test_the_ranks_keep_what_slurm_gave(cluster, repo, tmp_path):
    """On shared nodes, of whose two GPUs another job has the first, and where srun would bind the task to a core."""
    (tmp_path / "show.py").write_text(SHOW)
    shared = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--exclusive=user"]
    other = cluster.command("sbatch", "--parsable", "--output=/dev/null", *shared, "--wrap=sleep 300").strip()
    wait_until(lambda: cluster.state(other) == "RUNNING", "the other job", tmp_path / "none", 60)
    environment = cluster.environment | {"SLURM_CPU_BIND": "cores", "SRUN_ARGS": "--export='ALL,FROM_SRUN_ARGS=a b'"}
    run_show = [sys.executable, "-c", RUN_SHOW, str(tmp_path), str(tmp_path / "show.py")]
    done = subprocess.run(
        ["salloc", *shared, "--cpus-per-task=2", *run_show],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    cluster.command("scancel", other)
    logs = "".join(path.read_text() for path in tmp_path.glob("show-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    seen = sorted(json.loads(line[len("seen ") :]) for line in logs.splitlines() if line.startswith("seen "))
    assert seen == [[str(rank), "1", "a b", 2] for rank in range(2)]


@pytest.mark.skipif(find_machine().has_gpu and torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_ends_the_preflight(cluster, repo, data, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    given = [f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    job = submit(cluster, repo, log, *FIRST, *given, DS_ACCELERATOR=None)
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", log)
    assert cluster.state(job) == "FAILED" and "no training is started" in log.read_text()
    found = "".join(path.read_text() for path in (run_dir / "logs").glob("preflight-*.log"))
    assert "error: torch" in found and "(Slurm gave 1)" in found and "or set DS_ACCELERATOR=cpu" in found


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one CPU, which is enough then")
def test_too_few_cpus_end_the_preflight(cluster, repo, data, tmp_path):
    log, run_dir = tmp_path / "job.log", tmp_path / "run"
    given = [f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    job = submit(cluster, repo, log, *FIRST, *given, options=("--cpus-per-task=1",))
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", log)
    assert cluster.state(job) == "FAILED" and "no training is started" in log.read_text()
    found = (run_dir / "logs" / f"preflight-{job}-node1.log").read_text()
    for node in ("node1", "node2"):
        assert f"error: {node}: Slurm gave the job 1 of the node's {os.cpu_count()} CPUs" in found, found[-3000:]


def test_srun_without_the_launcher_is_one_line(cluster, repo, tmp_path):
    command = ["srun", "--nodes=2", "--ntasks=4", "--exclusive=user", sys.executable, "train/main.py", *FIRST]
    done = subprocess.run(
        [*command, f"run_dir={tmp_path}/run"],
        cwd=repo, env=cluster.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    errors = [line for line in done.stderr.splitlines() if not line.startswith("srun: ")]
    assert len(errors) == 1 and errors[0].startswith("error: Slurm has 4 tasks, and no launcher"), done.stderr


def test_a_missing_partition(cluster, repo):
    command = ["sbatch", "--partition=gpu", "--nodes=2", "launch/slurm/train.sbatch"]
    done = subprocess.run(command, cwd=repo, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode and "invalid partition" in done.stderr
