"""The preflight on two ranks that stand for two nodes: one that fails is named, with the remedy."""

import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from launch.nodes.checks import disk_faults, read_rate
from launch.nodes.cpus import Cpus, cpu_faults, find_cpus
from launch.nodes.network import tournament
from launch.preflight import record, slow_pairs, training_ranks
from tests.support.trainings import SMALL, free_port, make_data
from train.compose import compose_config
from train.faults.quarantine import read_node_faults
from train.inputs import resolve_text_shape

FAST = ["test_mb=1", "step_seconds=60"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def preflight(trees: list[Path], overrides: list[list[str]], **more: str) -> tuple[list[int], str, str]:
    """One process in each tree with its own overrides; exit statuses, stdout and stderr of the first.

    more: for the environment.
    """
    port, started = str(free_port()), []
    for rank, (tree, own) in enumerate(zip(trees, overrides, strict=True)):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "SLURMD_NODENAME": f"node{rank + 1}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        } | more  # fmt: skip
        command = [sys.executable, "-m", "launch.preflight", *SMALL, *FAST, *own]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tree, env=environment, **pipes))
    output = [process.communicate(timeout=200) for process in started]
    return [process.returncode for process in started], *output[0]


def test_two_good_nodes_and_three_kinds_of_bad_ones(repo, data, tmp_path):
    good = [f"run_dir={tmp_path / 'run'}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    status, out, err = preflight([repo, repo], [good, good])
    assert status == [0, 0], err[-3000:]
    assert "2 ranks on 2 nodes" in out and "every node is ready" in out
    assert "slowest pair of nodes: node1 and node2" in out and "all-reduce among all" in out
    assert not list((tmp_path / "run").glob(".preflight-*"))

    # Of the second node: storage that isn't mounted, a folder of its own, and a checkout that is a line behind.
    other = tmp_path / "checkout"
    other.mkdir()
    for folder in ("train", "model", "data", "launch", "conf"):
        shutil.copytree(repo / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repo / "if_train.py", other)
    with open(other / "model/losses.py", "a") as source:
        source.write("# changed\n")
    bad = [f"run_dir={tmp_path / 'own'}", "data.shards=nowhere", good[2]]
    status, out, err = preflight([repo, other], [good, bad])
    assert status == [2, 2]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and all(line.startswith("error: node2") for line in errors), errors
    for message in (f"no folder '{other / 'nowhere'}'", "is not the one that node1 sees", "other code"):
        assert any(message in line for line in errors), message
    assert "every node is ready" not in out


def test_a_full_disk_slow_storage_and_one_cpu_are_faults(repo, data, tmp_path):
    good = [f"run_dir={tmp_path / 'run'}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    greedy = [*good, "keep_checkpoints=100000000", "step_seconds=1e-9"]
    status, _, err = preflight([repo, repo], [greedy, greedy], SLURM_CPUS_ON_NODE="1")
    assert status == [2, 2]
    assert err.count("Slurm gave the job 1 of the node's") == (2 if os.cpu_count() > 1 else 0)
    assert err.count("GB free") == 2 and err.count("MB/s a node") == 2
    assert "node1, rank 0" in err and "node2, rank 1" in err


def test_storage_is_named_only_where_it_may_be_missing(data, tmp_path, monkeypatch):
    def told(*changed: str) -> str:
        given = [f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
        rate, (fault,) = read_rate(compose_config([*SMALL, *given, *changed]), 0.0)
        assert rate == 0.0
        return fault

    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty"):
        hint = f"; or the storage of '{tmp_path / folder}' is not mounted on this node"
        assert told(f"data.shards={tmp_path / folder}").endswith(hint)
        assert told(f"data.text={tmp_path / folder}").endswith(hint)
    assert "mounted" not in told("data.tokens=8"), "a mistake that every node has"
    monkeypatch.setattr("launch.nodes.checks.find_inputs", Mock(side_effect=OSError(5, "Input/output error")))
    assert told() == "[Errno 5] Input/output error"


def test_steps_that_are_not_known_yet_take_no_negative_space(tmp_path, monkeypatch):
    config = compose_config([*SMALL, f"run_dir={tmp_path}", "ema_snapshot_every=5", "steps=-1"])
    resolve_text_shape(config)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    (tmp_path / "snapshots" / "step-00000005").mkdir(parents=True)
    (fault,) = disk_faults(config, ranks=1)
    assert "0.0 GB free" in fault and "snapshots" not in fault


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 64])
def test_everyone_meets_everyone_once(nodes):
    rounds = tournament(list(range(nodes)))
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert sorted(met) == list(combinations(range(nodes), 2))
    for pairs in rounds:
        assert len({player for pair in pairs for player in pair}) == 2 * len(pairs)


def test_the_ranks_of_spare_nodes_have_no_part_of_the_batch():
    assert training_ranks(520, 65, 1) == 512 and training_ranks(16, 2, 0) == 16
    with pytest.raises(ValueError, match="spares=2 must be a number below the 2 nodes"):
        training_ranks(16, 2, 2)


def test_a_slow_pair_is_named():
    rates = {("a", "b"): 10e9, ("a", "c"): 2e9, ("b", "c"): 9e9, ("c", "d"): 10e9}
    (fault,) = slow_pairs(rates)
    assert fault.startswith("a and c: 2.00 GB/s")
    assert not slow_pairs({}) and not slow_pairs({("a", "b"): 1.0})


def cpus(bound: int, given: int | None = None, first: int = 0, of_node: int = 96) -> Cpus:
    return Cpus(frozenset(range(first, first + bound)), given, of_node)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([cpus(96)] * 8, None),
        ([cpus(96, given=96)] * 8, None),
        ([cpus(40, given=40)] * 8, None),  # one for each of 8 ranks and 32 workers
        ([cpus(5, first=5 * i) for i in range(8)], None),  # each rank with CPUs of its own
        ([cpus(32, given=32, of_node=32)] * 8, None),  # the node has no more
        (
            [cpus(1)] * 8,
            "n: all that runs there is bound to 1 of the node's 96 CPUs, for 8 ranks with 4 loader workers",
        ),
        ([cpus(39)] * 8, "bound to 39 of the node's 96 CPUs"),
        (
            [cpus(96, given=1)] * 8,
            "n: Slurm gave the job 1 of the node's 96 CPUs, .* --exclusive or --cpus-per-task=40",
        ),
        ([*[cpus(96)] * 7, cpus(2)], "n: its rank 7 is bound to 2 of the node's 96 CPUs, for itself and 4 loader"),
    ],
)
def test_too_few_cpus_for_ranks_and_workers(ranks, message):
    faults = cpu_faults({"n": ranks, "good": [cpus(96)]}, workers=4)
    assert len(faults) == (message is not None)
    if message:
        assert re.match(f".*{message}", faults[0])


def test_the_cpus_of_a_process_are_those_that_it_is_bound_to():
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert find_cpus({"SLURM_CPUS_ON_NODE": "4"}) == Cpus(frozenset({min(own)}), 4, os.cpu_count())
    finally:
        os.sched_setaffinity(0, own)
    assert find_cpus({}) == Cpus(frozenset(own), None, os.cpu_count())


def test_the_faults_of_single_nodes_are_remembered_and_those_of_the_job_are_not(tmp_path):
    nodes = {"node1", "node10", "node2"}
    record(tmp_path, nodes, ["node10, rank 8: GPU 0 has 5 GB in use", "node1 and node2: 0.1 GB/s between them"])
    record(tmp_path, nodes, ["node10: its clock is +9.0 s off: start chrony"])
    found = read_node_faults(tmp_path)
    assert list(found) == ["node10"] and found["node10"]["preflight"]["times"] == 2
    assert "clock" in found["node10"]["preflight"]["what"]
    record(tmp_path, nodes, [f"{node}: Slurm gave the job 1 of the node's 96 CPUs" for node in nodes])
    assert read_node_faults(tmp_path) == found
