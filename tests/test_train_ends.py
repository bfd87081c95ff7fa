"""Trainings that end early or never begin, and the one line that tells why; what a dry run tells."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data.index import Index, index
from data.storage.shards import find_shards
from data.storage.tars import read_shard, write_shard
from data.text.encoder import load_encoder
from tests.support.trainings import SMALL, launch, make_data, metrics, start
from train.compose import compose_config
from train.faults.compiler import check_compiler
from train.inputs import find_inputs
from train.main import look


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_prompts_of_ones_own_are_encoded_before_the_start(data):
    given = [o for o in SMALL if "prompts" not in o] + [f"data.{name}={data / name}" for name in ("shards", "text")]
    config = compose_config([*given, "sample.prompts=['a red circle, left', a cat's toy]"])
    found = find_inputs(config)
    assert [caption for caption, _ in found.prompts] == ["a red circle, left", "a cat's toy"]
    expected = load_encoder(found.meta)(["a cat's toy"])[0]
    np.testing.assert_allclose(found.prompts[1][1], expected, atol=1e-5)
    assert not find_inputs(config, readable_only=True).prompts and not find_inputs(compose_config(given)).prompts
    with pytest.raises(ValueError, match=r"sample.prompts are captions of your own, .*'gone' cannot be loaded.*number"):
        find_inputs(compose_config([*given, "sample.prompts=[a]", "text.encoder=gone"]))


def test_tensorboard_without_its_package_is_refused_before_the_start(data, tmp_path, monkeypatch, capsys):
    given = [*SMALL, *(f"data.{name}={data / name}" for name in ("shards", "text")), "wandb.mode=disabled"]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert look(compose_config([*given, f"run_dir={tmp_path}/run"]), 1)
    assert look(compose_config([*given, f"run_dir={tmp_path}/run", "tensorboard=true"]), 1) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: tensorboard=true needs the package tensorboard (") and "pip install" in line
    assert not (tmp_path / "run").exists()


def test_compile_without_a_compiler_is_told_in_one_line_before_anything_starts(repo, data, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, fault in (("no-such-compiler", "cannot be started: No such"), (broken, "fails: omp.h: No such file")):
        monkeypatch.setenv("CXX", str(compiler))
        done = launch(repo, data, tmp_path / "run", "compile=true")
        assert done.returncode == 2 and not (tmp_path / "run").exists()
        (line,) = [line for line in done.stderr.splitlines() if "compile" in line]
        assert line.startswith(f"error: compile=true needs a C++ compiler, and '{compiler}' {fault}")
        assert line.endswith("install g++ and python3-dev, name another one in CXX, or set compile=false")
    # With one that runs nothing is said, and for a GPU that is a compiler of C.
    monkeypatch.delenv("CXX")
    check_compiler(on_gpu=False)
    check_compiler(on_gpu=True)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C compiler, and 'no-such-compiler' cannot be started"):
        check_compiler(on_gpu=True)


def test_nothing_is_compiled_and_a_lock_left_by_a_killed_compilation_holds_nobody_up(repo, data, tmp_path, monkeypatch):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    done = launch(repo, data, tmp_path / "run", "wandb.mode=disabled", "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


def test_a_shard_that_stays_unreadable_ends_the_run_or_is_passed_over(repo, data, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(data, gone)
    index(Index(str(gone / "shards"), workers=1))
    shard = gone / "shards/00001.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])  # another size than the index says
    steps = ("wandb.mode=disabled", "steps=3", "global_batch=32", "data.max_bad_share=1")
    done = launch(repo, gone, tmp_path / "fail", *steps, "data.unreadable_shard=fail")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "00001.tar cannot be read: it has" in done.stderr and "data.unreadable_shard=skip" in done.stderr
    done = launch(repo, gone, tmp_path / "skip", *steps)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(line["bad_samples"] for line in metrics(tmp_path / "skip")) == 24, "those of the shard, once an epoch"
    assert "shard unreadable" in (tmp_path / "skip/quarantine/rank_00000.jsonl").read_text()


def test_bad_images_are_counted_reported_and_add_nothing_and_too_many_stop_the_run(repo, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    for shard in find_shards(broken / "shards"):
        samples = list(read_shard(shard.location, {"jpg", "txt", "json"}))
        write_shard(Path(shard.location), [(key, members | {"jpg": members["jpg"][:200]}) for key, members in samples])
    done = launch(repo, broken, tmp_path / "all", "data.max_bad_share=1", "wandb.mode=disabled", "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    for line in metrics(tmp_path / "all"):
        assert (line["bad_samples"], line["loss"], line["grad_norm"]) == (8, 0, 0)
    assert "truncated image" in done.stdout + done.stderr
    listed = [json.loads(line) for line in (tmp_path / "all/quarantine/rank_00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in listed] == [1] * 8 + [2] * 8 + [3] * 8
    assert {line["reason"] for line in listed} == {"truncated image"}
    done = launch(repo, broken, tmp_path / "many", "wandb.mode=disabled", "data.max_bad_share=0.02")
    assert done.returncode == 2
    assert "more than data.max_bad_share=0.02" in done.stderr and "Traceback" not in done.stderr


def test_a_grid_that_cannot_be_written_ends_all_ranks_with_its_error(repo, data, tmp_path):
    """And not in a wait of the first rank for the others, who wait for the grid, until the watchdog ends them."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "samples").write_text("a file where the grids' folder belongs")
    process = start(repo, data, run_dir, "steps=3", "save_every=3", ranks=2)
    try:
        out, error = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode and "step-00000003.png' could not be written" in out + error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.typo=1"], "unknown key 'model.typo'"),
        (["model.typo=1"], "unknown key 'model.typo'"),
        (["global_batch=9"], "global_batch=9 is not a multiple of 1 rank x micro_batch=4"),
        (["model.num_head_channels=33"], "num_head_channels=33"),
        (["model.encoder_dim=128"], "64 wide"),
        (["data.shards=nowhere"], "/nowhere': check the path, or make shards with"),
        (["init_from=nowhere"], "/nowhere': name a file or folder on this machine"),
        (["wandb.mode=online"], "run `wandb login`"),
    ],
)
def test_mistakes_end_before_training_in_one_line(repo, data, tmp_path, overrides, message):
    done = launch(repo, data, tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_says_what_would_run_and_leaves(repo, data, tmp_path):
    done = launch(repo, data, tmp_path / "run", "dry_run=true")
    assert done.returncode == 0
    for words in (
        "1 rank x 4 micro batch x 2 accumulation = 8",
        "4 shards, 96 samples",
        "16 x 64, float32",
        "parameters",
    ):
        assert words in done.stdout
    assert re.search(r"host memory  about \d+\.\d GB per rank; \d+\.\d GB are free here", done.stdout)
    assert not (tmp_path / "run").exists()
    missing = launch(repo, data, tmp_path / "run", "dry_run=true", "data.shards=nowhere", "global_batch=9")
    assert missing.returncode == 2, missing.stdout
    of_data, of_batch = missing.stderr.splitlines()[-2:]
    assert of_data.startswith("error: ") and "make shards with" in of_data
    assert of_batch.startswith("error: global_batch=9 is not a multiple of 1 rank x micro_batch=4")
