"""The list of bad samples: it is bounded, has whole lines over restarts, and never stops a run."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from train.faults.quarantine import NODES, Quarantine, bad_nodes, read_node_faults, record_node_fault


def listed(run_dir: Path, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "quarantine" / f"rank_{rank:05d}.jsonl").read_text().splitlines()]


def bad(*numbers: int) -> list[tuple[str, str]]:
    return [(f"00000.tar:{n:09d}", "corrupt image") for n in numbers]


def test_each_bad_sample_is_a_line_at_once(tmp_path):
    quarantine = Quarantine(tmp_path, 3)
    quarantine.add(7, [("00001.tar:000010005", "too many pixels"), ("00002.tar:\udcff é", "no image")])
    assert listed(tmp_path, 3) == [
        {"step": 7, "sample": "00001.tar:000010005", "reason": "too many pixels"},
        {"step": 7, "sample": "00002.tar:\udcff é", "reason": "no image"},
    ]
    quarantine.add(8, bad(1))
    assert listed(tmp_path, 3)[-1]["step"] == 8


def test_a_run_without_bad_samples_writes_no_file(tmp_path):
    quarantine = Quarantine(tmp_path / "run", 0)
    for step in range(100):
        quarantine.add(step, [])
    assert not (tmp_path / "run").exists()


def test_the_list_is_bounded_over_restarts(tmp_path, caplog):
    for start in range(4):
        quarantine = Quarantine(tmp_path, 0, limit=10)
        for step in range(2):
            quarantine.add(step, bad(start * 2 + step, 99))
    assert len(listed(tmp_path)) == 10
    assert [line["sample"][-1] for line in listed(tmp_path)[::2]] == list("01234")
    assert caplog.text.count("only counted from here on") == 1
    Quarantine(tmp_path, 1, limit=10).add(0, bad(*range(25)))
    assert len(listed(tmp_path, 1)) == 10
    Quarantine(tmp_path, 2).add(0, [("x" * 10**6, "no image")] * 1500)
    assert len(listed(tmp_path, 2)) == 1000
    assert (tmp_path / "quarantine" / "rank_00002.jsonl").stat().st_size < 400_000


def test_a_list_above_the_limit_is_not_extended(tmp_path):
    Quarantine(tmp_path, 0, limit=10).add(0, bad(*range(10)))
    Quarantine(tmp_path, 0, limit=5).add(1, bad(*range(10)))
    assert len(listed(tmp_path)) == 10


@pytest.mark.parametrize("incomplete", [b'{"step": 4, "sam', b"\xff\xfe", b"{"])
def test_an_incomplete_last_line_is_cut_off(tmp_path, incomplete):
    Quarantine(tmp_path, 0).add(1, bad(1, 2))
    path = tmp_path / "quarantine" / "rank_00000.jsonl"
    path.write_bytes(path.read_bytes() + incomplete)
    Quarantine(tmp_path, 0).add(5, bad(3))
    assert [line["step"] for line in listed(tmp_path)] == [1, 1, 5]
    path.write_bytes(incomplete)
    Quarantine(tmp_path, 0).add(6, bad(4))
    assert [line["step"] for line in listed(tmp_path)] == [6]


def test_a_folder_that_cannot_be_written_gives_one_warning(tmp_path, caplog):
    (tmp_path / "quarantine").write_text("a file where the folder should be")
    quarantine = Quarantine(tmp_path, 0)
    for step in range(5):
        quarantine.add(step, bad(step))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be written" in caplog.text


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from train.faults.quarantine import NODES, Quarantine, bad_nodes, read_node_faults, record_node_fault
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
quarantine = Quarantine(Path(sys.argv[1]), 0)
quarantine.add(0, [("first", "no image")])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for step in range(1, 6):
    quarantine.add(step, [(f"sample {step}", "no image")])
print("continued")
"""


def test_a_disk_that_fills_up_does_not_end_the_run(tmp_path, repo):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=repo, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "continued\n", done.stderr
    assert done.stderr.count("cannot be written") == 1
    # The next start cuts off the line that the full disk left incomplete.
    Quarantine(tmp_path, 0).add(9, bad(9))
    assert [line["step"] for line in listed(tmp_path)][-1] == 9 and listed(tmp_path)[0]["sample"] == "first"


def test_the_faults_of_a_node_are_counted_and_make_it_bad(tmp_path):
    assert read_node_faults(tmp_path) == {} == bad_nodes(tmp_path, 1)
    record_node_fault(tmp_path, "node7", "straggler", "GPU 3: forward 20 % behind")
    record_node_fault(tmp_path, "node7", "corruption", "x" * 10**6)
    record_node_fault(tmp_path, "node2", "straggler", "GPU 0")
    record_node_fault(tmp_path, "node7", "straggler", "GPU 3: again")
    found = read_node_faults(tmp_path)
    assert {node: {kind: fault["times"] for kind, fault in faults.items()} for node, faults in found.items()} == {
        "node7": {"straggler": 2, "corruption": 1}, "node2": {"straggler": 1},
    }  # fmt: skip
    assert found["node7"]["straggler"]["what"] == "GPU 3: again" and (tmp_path / NODES).stat().st_size < 2000
    assert list(bad_nodes(tmp_path, 3)) == ["node7"] and list(bad_nodes(tmp_path, 1)) == ["node7", "node2"]
    assert "straggler 2 x (GPU 3: again), corruption 1 x" in bad_nodes(tmp_path, 3)["node7"]
    assert not bad_nodes(tmp_path, 0), "it remembers, and leaves none out"
    assert [path.name for path in tmp_path.iterdir()] == [NODES], "nothing is left aside"


def test_a_node_that_computed_wrongly_is_left_out_at_once_and_others_after_so_many_faults(tmp_path):
    record_node_fault(tmp_path, "node1", "corruption", "step 200: rank 8 (device 0 of node node1): its masters changed")
    for kind in ("death", "straggler"):
        record_node_fault(tmp_path, "node2", kind, "once")
    assert list(bad_nodes(tmp_path, 3)) == ["node1"] and not bad_nodes(tmp_path, 0)
    record_node_fault(tmp_path, "node2", "death", "again")
    assert list(bad_nodes(tmp_path, 3)) == ["node1", "node2"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"death": {}}}', '{"a": {"death": {"times": "x"}}}'])
def test_a_damaged_list_of_nodes_is_named_and_kept(tmp_path, caplog, content):
    (tmp_path / NODES).write_text(content)
    with pytest.raises(ValueError, match=r"is no list of nodes.*or delete it to forget them"):
        bad_nodes(tmp_path, 3)
    record_node_fault(tmp_path, "node7", "death", "killed")
    assert "the fault of node7 (death: killed) is not recorded" in caplog.text
    assert (tmp_path / NODES).read_text() == content


def test_a_fault_is_told_where_it_cannot_be_recorded(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    for run_dir in (tmp_path / "run", tmp_path / "gone"):
        record_node_fault(run_dir, "node7", "death", "killed")
    assert not (tmp_path / "gone").exists() and caplog.text.count("is not recorded") == 2
    assert "the fault of node7 (death: killed) is not recorded" in caplog.text
