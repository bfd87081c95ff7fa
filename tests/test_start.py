"""The start of many ranks: one looks at shards and checkpoints for all; each reads what it needs itself."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data import demo
from data.embed import Embed, embed
from data.loader.dataset import Dataset
from data.storage.shards import find_shards
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.support.split_checkpoint import split_checkpoint
from tests.support.trainings import free_port, launch, start
from train.checkpoint.format import latest_checkpoint
from train.checkpoint.resume import check_same_everywhere
from train.config import Config

SUPPORT = Path(__file__).resolve().parent / "support"
SHARDS, FILES = 48, 32
QUIET = ("wandb.mode=disabled", "optim.name=adamw", "optim.warmup_steps=2", "save_every=3", "data.workers=0")


def many_shards(folder: Path) -> Path:
    """A shard for each of some scenes, counted by their stats files, and their embeddings."""
    demo.main([f"out={folder / 'shards'}", f"samples={SHARDS}", "shard_size=1"])
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 16, "float32", "float32"))
    return folder


def count_looks(repo: Path, data: Path, run_dir: Path, out: Path, folder: Path) -> list[dict]:
    """What each of two ranks looks at under a folder, from the start to the end of a step."""
    script = SUPPORT / "counted_start.py"
    run = start(repo, data, run_dir, *QUIET, "steps=4", ranks=2, script=script, before=(str(out), str(folder)))
    said = "".join(run.communicate(timeout=300))
    assert run.returncode == 0, said[-3000:]
    assert "resumes from step 3" in said
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_one_rank_looks_for_all(repo, tmp_path):
    data, run_dir = many_shards(tmp_path / "data"), tmp_path / "run"
    done = launch(repo, data, run_dir, *QUIET, "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    split_checkpoint(latest_checkpoint(run_dir), FILES)
    os.rename(run_dir, tmp_path / "saved")
    for folder, most in (("data", 24), ("run", 12)):
        os.system(f"cp -r '{tmp_path / 'saved'}' '{run_dir}'")
        first, second = count_looks(repo, data, run_dir, tmp_path / f"looks-{folder}", tmp_path / folder)
        print(folder, first, second)
        assert second["stat"] + second.get("list", 0) < most < first["stat"], (folder, first, second)
        if folder == "run":
            # It verifies every other file, and reads the second half, which is its part.
            parts = {path.rpartition("rank-")[2] for path in second["opened"] if "step-00000003/rank-" in path}
            numbers = {int(part.partition(".")[0]) for part in parts}
            assert numbers == set(range(1, FILES, 2)) | set(range(FILES // 2, FILES))
        os.system(f"rm -r '{run_dir}'")
