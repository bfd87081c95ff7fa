"""What torch.compile wrote on one node is there on another, by way of an archive beside the code."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from train.compose import compose_config
from train.faults.compile_cache import VARIABLE, keep_cache, prepare_cache

CONFIG = ["+experiment=smoke", "compile=true"]


@pytest.fixture
def go_to_node(tmp_path, monkeypatch):
    """Let this process be on a node that has a temporary folder of its own."""

    def go(name: str, local_rank: int = 0) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.delenv(VARIABLE, raising=False)

    return go


def test_a_spare_node_has_what_the_others_compiled(go_to_node, tmp_path):
    config, kept = compose_config(CONFIG), tmp_path / "kept"
    go_to_node("node1")
    prepare_cache(config, kept)
    folder = Path(os.environ[VARIABLE])
    assert folder.is_relative_to(tmp_path / "node1") and not folder.exists(), "nothing is kept yet"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "code.so").write_bytes(b"compiled")
    keep_cache(kept)
    (folder / "ab" / "later").write_bytes(b"")
    keep_cache(kept)  # what is kept stays
    assert len(list(kept.iterdir())) == 1

    go_to_node("node2", local_rank=1)
    prepare_cache(config, kept)
    assert not Path(os.environ[VARIABLE]).exists(), "only the first rank of a node reads it"
    go_to_node("node2")
    prepare_cache(config, kept)
    there = Path(os.environ[VARIABLE])
    assert there.name == folder.name and (there / "ab" / "code.so").read_bytes() == b"compiled"
    assert not (there / "ab" / "later").exists()
    go_to_node("node2")
    prepare_cache(compose_config([*CONFIG, "micro_batch=2", "global_batch=8"]), kept)
    assert os.environ[VARIABLE] != str(there), "another net"


def test_a_cache_of_the_users_own_stays(go_to_node, tmp_path, monkeypatch):
    go_to_node("node1")
    prepare_cache(compose_config(CONFIG[:1]), tmp_path)
    assert VARIABLE not in os.environ, "nothing is compiled"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    prepare_cache(compose_config(CONFIG), tmp_path / "kept")
    keep_cache(tmp_path / "kept")
    assert os.environ[VARIABLE] == str(tmp_path / "own") and not (tmp_path / "kept").exists()


@pytest.mark.parametrize("damage", ["cut", "outside"])
def test_an_archive_that_cannot_be_used_is_told(go_to_node, tmp_path, caplog, damage):
    config, kept = compose_config(CONFIG), tmp_path / "kept"
    kept.mkdir()
    go_to_node("node1")
    prepare_cache(config, kept)
    archive = kept / f"{Path(os.environ[VARIABLE]).name}.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../../outside" if damage == "outside" else "code.so")
        member.size = 2000
        tar.addfile(member, io.BytesIO(bytes(2000)))
    if damage == "cut":
        os.truncate(archive, 1000)
    go_to_node("node1")
    prepare_cache(config, kept)
    assert "is compiled again, since what was kept of it cannot be used" in caplog.text
    assert not Path(os.environ[VARIABLE]).exists() and not list(tmp_path.rglob("outside"))


def test_a_folder_that_is_somebody_elses_is_not_used(go_to_node, tmp_path, monkeypatch):
    go_to_node("node1")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    prepare_cache(compose_config(CONFIG), tmp_path / "kept")
    assert VARIABLE not in os.environ


COMPILE = """
import os, sys
from pathlib import Path
from train.compose import compose_config
from train.faults.compile_cache import keep_cache, prepare_cache
prepare_cache(compose_config(["+experiment=smoke", "compile=true"]), Path(sys.argv[1]))
import torch
from torch._dynamo.utils import counters
torch.compile(lambda x: (x * 2).relu().sum())(torch.ones(100))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
keep_cache(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_torch_compiles_nothing_on_the_second_node(repo, tmp_path):
    found = []
    for node in ("node1", "node2"):
        (tmp_path / node).mkdir()
        environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"TMPDIR": str(tmp_path / node)}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(tmp_path / "kept")],
            cwd=repo, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["0", "1"], ["1", "0"]]
