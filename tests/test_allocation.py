"""The decisions of the batch script, without Slurm; tests/test_slurm.py runs it on a real one."""

import json
import os
import re
import socket
import subprocess

import pytest

from data import progress
from data.cli import CORRUPTED, LOST, MISTAKE, REQUEUE
from launch.slurm.allocation import Allocation, check_hostfile, find_allocation, free_port, ranks_per_node
from launch.slurm.batch import LAUNCHER, NODE, Job, first_nodes, main, split_srun_args, verdict
from launch.slurm.in_place import End, choose_nodes, first_to_fail, read_ends, spare_nodes
from train.faults.launched import check_launched
from train.faults.quarantine import record_node_fault

JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[1-2]"}
TWO = Allocation("123", ["node1", "node2"], 8, "node1", 15123, 0)


def test_no_slurm_and_an_array_are_refused():
    with pytest.raises(ValueError, match=r"this is no Slurm job .*`sbatch launch/slurm/train"):
        find_allocation({})
    with pytest.raises(ValueError, match="is task 4 of an array"):
        find_allocation(JOB | {"SLURM_ARRAY_TASK_ID": "4"})


def test_a_quiet_job_starts_a_quiet_training(monkeypatch, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nprintf "%s " "$@" >> {tmp_path}/said\n')
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = Job(Allocation("7", ["node1"], 1, "node1", 29500, 0), tmp_path / "hostfile", tmp_path)
    for quiet in (False, True):
        monkeypatch.setitem(progress._state, "quiet", quiet)
        assert job.run("train", "train/main.py", "steps=3") == 0
    assert re.findall(r"steps=3( -q)? ", (tmp_path / "said").read_text()) == ["", " -q"]


def test_no_slurm_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["+experiment=if_i_xl"])
    assert caught.value.code == MISTAKE
    assert capsys.readouterr().err.startswith("error: this is no Slurm job")


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "2"}, 2),
    ],
)
def test_ranks_of_a_node(environment, ranks):
    assert ranks_per_node(JOB | environment) == ranks


@pytest.mark.parametrize(
    ("environment", "message"), [({}, "has no GPUs"), ({"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE=all")]
)
def test_no_ranks_on_a_node(environment, message):
    with pytest.raises(ValueError, match=message):
        ranks_per_node(JOB | environment)


def test_ports():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} is taken on {socket.gethostname()}"):
            free_port(1, str(port))
    assert free_port(1, str(port)) == port
    assert free_port(7, None) != free_port(8, None)
    with pytest.raises(ValueError, match="MASTER_PORT=80 must be"):
        free_port(1, "80")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\n", "lacks node2"),
        ("node1 slots=8\nnode2 slots=8\nnode3 slots=8\n", "names node3"),
        ("node2 slots=8\nnode1 slots=8\n", "another order"),
        ("node1 slots=8\nnode2 slots=4\n", "gives node2 slots=4, Slurm 8"),
    ],
)
def test_a_hostfile_that_disagrees(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_hostfile(tmp_path / "hosts", TWO)


def test_its_own_hostfile_agrees(tmp_path):
    (tmp_path / "hosts").write_text(TWO.hostfile())
    check_hostfile(tmp_path / "hosts", TWO)
    with pytest.raises(ValueError, match="cannot be read"):
        check_hostfile(tmp_path / "missing", TWO)


@pytest.mark.parametrize(
    ("status", "done", "warned", "restarts", "reached", "again"),
    [
        (0, True, False, 0, 100, False),
        (1, True, True, 0, 100, False),  # all steps are made, whatever the launcher's status
        (REQUEUE, False, True, 0, 100, True),
        (REQUEUE, False, False, 0, 50, True),  # someone else signalled the ranks
        (143, False, True, 0, 100, True),
        (0, False, False, 0, 100, True),  # a killed launcher can leave 0 behind
        (1, False, False, 0, 100, True),
        (1, False, False, 0, 50, False),  # nothing was saved since this start, so it would repeat for ever
        (MISTAKE, False, False, 0, 100, False),
        (REQUEUE, False, True, 100, 100, False),
    ],
)
def test_when_to_requeue(status, done, warned, restarts, reached, again):
    found, why = verdict(status, done, warned, restarts, most=100, began_at=50, reached=reached)
    assert found == again and why


def test_spares_are_a_number_below_the_nodes():
    assert spare_nodes({}, 1) == 0 and spare_nodes({"SPARES": "2"}, 3) == 2
    for spares in ("3", "-1", "all"):
        with pytest.raises(ValueError, match=f"SPARES={spares} must be a number below the 3 nodes of the job"):
            spare_nodes({"SPARES": spares}, 3)


@pytest.mark.parametrize(
    ("usable", "failed", "wanted", "divides", "chosen"),
    [
        ("abcd", {}, 3, {3}, "abc"),
        ("abcd", {"b": 1}, 3, {3}, "acd"),  # the spare takes over
        ("abd", {"b": 1}, 3, {3}, "abd"),  # no other is left
        ("abcd", {"a": 1, "b": 2}, 3, {3}, "acd"),  # the one that failed less often
        ("abc", {"b": 1}, 4, {4, 3}, "abc"),  # one fewer, as the batch divides
        ("abc", {}, 4, {4, 2}, ""),  # two would be too few
        ("", {}, 1, {1}, ""),
    ],
)
def test_the_nodes_of_the_next_start(usable, failed, wanted, divides, chosen):
    assert choose_nodes([*"abcd"], [*usable], failed, wanted, lambda n: n in divides) == [*chosen]


def test_a_bad_node_is_left_out_of_the_first_start_while_others_are_enough(tmp_path):
    for node, kind in (("a", "corruption"), ("b", "death"), ("b", "death")):
        record_node_fault(tmp_path, node, kind, "x")
    assert first_nodes([*"abc"], tmp_path, 2, most=3) == ["b", "c"]
    assert first_nodes([*"abc"], tmp_path, 3, most=3) == ["a", "b", "c"]
    assert first_nodes([*"abc"], tmp_path, 2, most=0) == ["a", "c"], "none is bad: by the number of faults"


def test_the_node_that_failed_first(tmp_path):
    log, told = f"{tmp_path}/train-1", {
        "node1": f"{LOST} 10.5 0\n", "node2": "1 12.25 0\n", "node3": "247 11.5 0\n", "node4": "0 9.0 0\n",
        "node5": "1 x\n", "node6": "1 11.0 1\n", "node7": f"{MISTAKE} 10.0 0\n",
    }  # fmt: skip
    for node, text in told.items():
        (tmp_path / f"train-1-{node}.status").write_text(text)
    ends = read_ends(log, [*told, "node8"])
    assert set(ends) == {*told} - {"node5"} and not list(tmp_path.iterdir()) and not read_ends(log, told)
    assert first_to_fail(ends) == "node3", "not one that Slurm ended, nor those whose ranks lost another"
    assert first_to_fail({"node6": ends["node6"], "node1": ends["node1"]}) == "node6"
    corrupted = ends | {"node2": End(CORRUPTED, 11.0, False)}
    assert first_to_fail(corrupted) == first_to_fail({}) == "", "its node is counted already"


def test_a_start_on_other_nodes_has_a_port_of_its_own():
    again = TWO.on(["node2"], start=1)
    assert (again.nodes, again.master_addr, again.ranks) == (["node2"], "node2", 8)
    assert again.master_port != TWO.master_port and TWO.on(["node1"], start=0).master_port == TWO.master_port


def test_srun_args_are_split_as_by_a_shell():
    assert split_srun_args("") == []
    image = "--container-image='my image.sqsh' --container-mounts=/a:/a,/b:/b"
    assert split_srun_args(image) == ["--container-image=my image.sqsh", "--container-mounts=/a:/a,/b:/b"]
    with pytest.raises(ValueError, match="SRUN_ARGS=--a='b cannot be split into options: no closing quotation"):
        split_srun_args("--a='b")
    with pytest.raises(ValueError, match=r"SRUN_ARGS=image\.sqsh must be options of srun"):
        split_srun_args("image.sqsh")


@pytest.mark.parametrize("visible", ["5,GPU-0a1b", None])
def test_the_ranks_of_a_node_keep_the_gpus_that_slurm_gave(tmp_path, visible):
    show = "import json, os; print(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['LOCAL_RANK']]))"
    (tmp_path / "show.py").write_text(show)
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    command = ["bash", "-c", NODE, str(LAUNCHER), f"{tmp_path}/log", f"{tmp_path}/hosts", "127.0.0.1", "15000"]
    environment = os.environ | {"SLURMD_NODENAME": "node1", "SLURM_NODEID": "0"}
    environment |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    subprocess.run([*command, "show.py"], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "log-node1.status").read_text().startswith("0 ")
    lines = (tmp_path / "log-node1.log").read_text().splitlines()
    seen = sorted(json.loads(line) for line in lines if line.startswith('["'))
    assert seen == [[visible or "0,1", "0"], [visible or "0,1", "1"]]


def test_tasks_without_a_launcher_are_refused():
    task = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
    with pytest.raises(
        ValueError, match=r"Slurm has 8 tasks, and no launcher made them ranks .*launch/slurm/train.sbatch"
    ):
        check_launched(task)
    check_launched(task | {"RANK": "1"})
    check_launched(task | {"SLURM_STEP_NUM_TASKS": "1"})  # one process, in an allocation for eight
    check_launched({"SLURM_NTASKS": "8"})  # the shell of salloc
    check_launched({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # the batch script
    check_launched({})
