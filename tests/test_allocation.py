"""The decisions of the batch script, without Slurm; tests/test_slurm.py runs it on a real one."""

import socket

import pytest

from data.cli import REQUEUE
from launch.slurm.allocation import Allocation, check_hostfile, find_allocation, free_port, ranks_per_node
from launch.slurm.batch import MISTAKE, main, verdict

JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[1-2]"}
TWO = Allocation("123", ["node1", "node2"], 8, "node1", 15123, 0)


def test_no_slurm_and_an_array_are_refused():
    with pytest.raises(ValueError, match=r"this is no Slurm job .*`sbatch launch/slurm/train"):
        find_allocation({})
    with pytest.raises(ValueError, match="is task 4 of an array"):
        find_allocation(JOB | {"SLURM_ARRAY_TASK_ID": "4"})


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
