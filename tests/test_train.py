"""Real trainings: the deepspeed launcher, ZeRO-1, AdamW8bit; small scenes and a small net."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.embed import Embed, embed
from data.index import Index, index
from data.storage.shards import find_shards
from data.storage.tars import read_shard, write_shard
from data.text.encoder import load_encoder
from model.unet import UNet
from tests.support.faulty_server import serving
from tests.support.trainings import SMALL, STEPS, launch, make_data, metrics
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import complete_checkpoints, latest_checkpoint
from train.compose import compose_config
from train.faults.compiler import check_compiler
from train.inputs import find_inputs, resolve_text_shape
from train.monitor.rank_memory import needed_bytes
from train.summary import parameters


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def foreign_lines(done) -> list[str]:
    """What a run that is well shows on the screen and is not ours: neither the bar nor where the files are."""
    ours = re.compile(r"\S+: +\d+%\||(W&B|curves|samples|checkpoint) +/|resumes from step \d+")
    shown = (line.strip() for line in re.split(r"[\r\n]", done.stdout + "\n" + done.stderr))
    return [line for line in shown if line and not ours.match(line)]


@pytest.fixture(scope="module")
def two_ranks(repo, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    done = launch(repo, data, run_dir, "wandb.mode=offline", ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not foreign_lines(done)
    for what in ("curves", "samples", "checkpoint"):
        assert f"{what:10}  {run_dir}" in done.stdout, "it says where everything lies"
    return run_dir


def test_a_run_leaves_curves_samples_and_checkpoints(two_ranks):
    lines = metrics(two_ranks)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "mse", "vb", "lr", "grad_norm", "images_per_second", "data_wait_share", "bad_samples"):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert {f"mse_q{i}" for i in range(4)} <= set().union(*lines)
    assert abs(lines[0]["mse"] - 1) < 0.15, (
        "the zero-initialised net predicts no noise: the error is the noise's variance"
    )
    assert lines[0]["lr"] == pytest.approx(1e-4) and lines[1]["lr"] == pytest.approx(1e-3)
    assert lines[-1]["lr"] == pytest.approx(1e-6)
    for name in ("loss.png", "lr.png", f"samples/step-{STEPS:08d}.png"):
        assert Image.open(two_ranks / name).size[0] > 300
    assert list(two_ranks.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in complete_checkpoints(two_ranks)] == ["step-00000003", "step-00000006"]
    assert not list(two_ranks.rglob("*.part"))


def test_one_rank_gives_the_same_curve_as_two(repo, data, two_ranks, tmp_path):
    prompts = "sample.prompts=['a red circle, left', a blue square]"
    done = launch(repo, data, tmp_path / "one", "wandb.mode=disabled", prompts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "one" / "samples" / f"step-{STEPS:08d}.png").exists()
    for one, two in zip(metrics(tmp_path / "one"), metrics(two_ranks), strict=True):
        for name in ("loss", "mse", "vb"):
            assert one[name] == pytest.approx(two[name], rel=2e-3), (one["step"], name)
        assert one["step"] > 2 or one["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_an_encoder_on_the_rank_gives_the_curve_of_stored_embeddings(repo, data, two_ranks, tmp_path):
    text = tmp_path / "text"
    embed(Embed("", str(text), str(data / "t5"), 16, "float32", "float32", mode="meta"))
    online = ("wandb.mode=disabled", "text.mode=online", f"data.text={text}", "steps=3")
    done = launch(repo, data, tmp_path / "online", *online, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "parallelism has already been used" not in done.stderr
    for made, stored in list(zip(metrics(tmp_path / "online"), metrics(two_ranks), strict=False))[:2]:
        assert made["loss"] == pytest.approx(stored["loss"], rel=1e-4)
    assert (tmp_path / "online" / "samples" / "step-00000003.png").exists()


def test_prompts_of_ones_own_are_encoded_before_the_start(data):
    given = [o for o in SMALL if "prompts" not in o] + [f"data.{name}={data / name}" for name in ("shards", "text")]
    config = compose_config([*given, "sample.prompts=['a red circle, left', a cat's toy]"])
    found = find_inputs(config, rank=0)
    assert [caption for caption, _ in found.prompts] == ["a red circle, left", "a cat's toy"]
    expected = load_encoder(found.meta)(["a cat's toy"])[0]
    np.testing.assert_allclose(found.prompts[1][1], expected, atol=1e-5)
    assert not find_inputs(config, rank=1).prompts and not find_inputs(compose_config(given), rank=0).prompts
    with pytest.raises(ValueError, match=r"sample.prompts are captions of your own, .*'gone' cannot be loaded.*number"):
        find_inputs(compose_config([*given, "sample.prompts=[a]", "text.encoder=gone"]), rank=0)


def test_bf16_follows_fp32(repo, data, two_ranks, tmp_path):
    done = launch(repo, data, tmp_path / "bf16", "wandb.mode=disabled", "precision=bf16", "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    for low, full in list(zip(metrics(tmp_path / "bf16"), metrics(two_ranks), strict=False))[:2]:
        assert low["loss"] == pytest.approx(full["loss"], rel=0.03)
    state = load_file(latest_checkpoint(tmp_path / "bf16") / "rank-00000.safetensors")
    assert state["master"].dtype == state["ema"].dtype == torch.float32
    finer = state["master"].bfloat16().float() != state["master"]
    assert finer.float().mean() > 0.5, "the masters are finer than bf16"


@pytest.mark.slow
def test_a_compiled_net_follows_the_eager_one(repo, data, two_ranks, tmp_path):
    done = launch(
        repo, data, tmp_path / "compiled", "wandb.mode=disabled", "compile=true", "model.activation=gelu_3bit"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch(repo, data, tmp_path / "eager", "wandb.mode=disabled", "model.activation=gelu_3bit")
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, eager in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(eager["loss"], rel=2e-3)


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


def test_a_rerun_goes_on_bit_identically(repo, data, two_ranks, tmp_path):
    run_dir = tmp_path / "again"
    shutil.copytree(two_ranks, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    # What a start that died beyond its last checkpoint leaves: later metrics, half a line, half a checkpoint.
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    (run_dir / "checkpoints" / "step-00000006.part").mkdir()
    # What is kept for backward may change on the way: it makes no difference to a single bit.
    done = launch(repo, data, run_dir, "wandb.mode=disabled", "recompute=cheap", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not foreign_lines(done)
    names = ("step", "loss", "mse", "vb", "lr", "grad_norm")
    assert [[line[n] for n in names] for line in metrics(run_dir)] == [
        [line[n] for n in names] for line in metrics(two_ranks)
    ]
    for rank in range(2):
        file = f"checkpoints/step-00000006/rank-{rank:05d}.safetensors"
        before, after = load_file(two_ranks / file), load_file(run_dir / file)
        assert {"master", "ema", "moments.state1", "moments.absmax2"} <= set(before)
        assert before["moments.state1"].dtype == torch.uint8, "8-bit moments"
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


@pytest.mark.slow
def test_a_run_over_http_through_failures_is_the_one_from_disk(repo, data, two_ranks, tmp_path):
    shutil.copytree(data / "shards", tmp_path / "shards")
    index(Index(str(tmp_path / "shards"), workers=1))
    files = {f"shards/{p.name}": p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    with serving(files | {f"text/{p.name}": p.read_bytes() for p in (data / "text").iterdir()}) as server:
        server.faults = ["500", "", "cut", "", "503", "reset", "short", "refuse"]
        where = (f"data.shards={server.url}/shards", f"data.text={server.url}/text")
        done = launch(repo, data, tmp_path / "remote", "wandb.mode=disabled", *where, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not server.faults, "all of them befell the run"
    names = ("step", "loss", "mse", "vb", "grad_norm", "bad_samples")
    curves = [[[line[n] for n in names] for line in metrics(run)] for run in (tmp_path / "remote", two_ranks)]
    assert curves[0] == curves[1]


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


def test_a_checkpoint_is_a_state_dict_of_the_released_names(two_ranks):
    checkpoint = Checkpoint.open(two_ranks)
    assert (checkpoint.config["data"]["tokens"], checkpoint.model.encoder_dim) == (16, 64), "not given: the embeddings'"
    unet = UNet(checkpoint.model)
    for name in ("ema", "master"):
        weights = checkpoint.weights(name)
        unet.load_state_dict(weights, strict=True)
        assert weights["out.2.weight"].abs().max() > 0, "the zero-initialised layer has moved"
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        Checkpoint.open(two_ranks / "checkpoints")


def test_a_run_begins_from_the_weights_of_another_in_full_precision(repo, data, two_ranks, tmp_path):
    weights, run_dir = Checkpoint.open(two_ranks).weights("ema"), tmp_path / "tuned"
    # A rate of nearly nothing: what is saved after the first steps is what was begun with.
    still = ("optim.lr_start=1e-12", "optim.lr_peak=1e-12", "optim.lr_end=1e-12", "precision=bf16")
    begin = ("wandb.mode=disabled", "steps=3", f"init_from={two_ranks}", *still)
    done = launch(repo, data, run_dir, *begin, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("master", "ema"):
        for name, value in Checkpoint.open(run_dir).weights(kind).items():
            torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-9)
    assert metrics(run_dir)[0]["mse"] < metrics(two_ranks)[0]["mse"] - 0.02
    # Once there is a checkpoint, the run goes on from that.
    done = launch(repo, data, run_dir, *begin[:1], "steps=4", "init_from=nowhere", *still, ranks=2)
    assert done.returncode == 0 and metrics(run_dir)[-1]["step"] == 4, done.stderr[-3000:]


def test_a_damaged_checkpoint_is_passed_over(two_ranks, tmp_path):
    run_dir = tmp_path / "damaged"
    shutil.copytree(two_ranks, run_dir)
    (run_dir / "checkpoints" / "step-00000006" / "rank-00001.safetensors").write_bytes(b"half")
    assert [path.name for path in complete_checkpoints(run_dir)] == ["step-00000003"]


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.typo=1"], "unknown key 'model.typo'"),
        (["model.typo=1"], "unknown key 'model.typo'"),
        (["global_batch=9"], "global_batch=9 is not a multiple of 1 rank x micro_batch=4"),
        (["model.num_head_channels=33"], "num_head_channels=33"),
        (["model.encoder_dim=128"], "64 wide"),
        (["data.shards=nowhere"], "/nowhere': check the path, or make shards with"),
        (["init_from=nowhere"], "/nowhere': download them first"),
        (["wandb.mode=online"], "run `wandb login`"),
    ],
)
def test_mistakes_end_before_training_in_one_line(repo, data, tmp_path, overrides, message):
    done = launch(repo, data, tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_refused(repo, data, two_ranks, tmp_path):
    run_dir = tmp_path / "other"
    shutil.copytree(two_ranks, run_dir)
    done = launch(repo, data, run_dir, "wandb.mode=disabled", "seed=1")
    assert done.returncode == 2 and "was trained with seed=0, now it is 1: set it back" in done.stderr


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_one_before_stays(repo, data, two_ranks, tmp_path):
    run_dir = tmp_path / "full"
    shutil.copytree(two_ranks, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    size = (run_dir / "checkpoints" / "step-00000003" / "rank-00000.safetensors").stat().st_size
    limit = (size // 2, size // 2)
    done = launch(repo, data, run_dir, "wandb.mode=disabled", ranks=2, file_size=limit)
    assert done.returncode != 0
    assert "could not be written" in done.stderr and "those before are intact" in done.stderr
    assert [path.name for path in complete_checkpoints(run_dir)] == ["step-00000003"]


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


def test_the_memory_of_a_rank_is_told_before_it_is_taken(repo, data, two_ranks):
    """The peak of a real rank, libraries included, against the estimate of dry_run."""
    config = compose_config([o for o in SMALL if "sample" not in o] + [f"data.text={data / 'text'}"])
    resolve_text_shape(config)
    needed = sum(needed_bytes(config, 2, *parameters(config), on_gpu=False))
    measured = metrics(two_ranks)[-1]["memory_gb"] * 1e9
    assert 0.6 * measured < needed < 1.7 * measured, (needed, measured)
