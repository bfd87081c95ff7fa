"""Real trainings: the deepspeed launcher, ZeRO-1, AdamW8bit; small scenes and a small net."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from data import demo
from data.embed import Embed, embed
from data.index import Index, index
from data.loader.dataset import Dataset
from data.loader.held_out import HeldOut
from data.storage.shards import find_shards
from if_train import project_version
from model.diffusion import Diffusion
from model.unet import UNet
from tests.support.faulty_server import serving
from tests.support.trainings import SMALL, STEPS, launch, make_data, metrics
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import complete_checkpoints, latest_checkpoint
from train.checkpoint.identity import add_missing_digests
from train.compose import compose_config
from train.evaluation.validation import validation_losses
from train.inputs import find_inputs, resolve_text_shape
from train.monitor.rank_memory import needed_bytes
from train.summary import parameters
from train.weights.power_average import TRACKED
from train.weights.trained_net import load_net


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> list[str]:
    """18 held-out scenes: five micro batches, three for one of two ranks and two for the other."""
    demo.main([f"out={data / 'held_out'}", "samples=27", "shard_size=10", "seed=9"])
    text = data / "held_out_text"
    embed(Embed(str(data / "held_out"), str(text), str(data / "t5"), 16, "float32", "float32"))
    given = {"shards": data / "held_out", "text": text, "samples": 18}
    return [f"data.validation.{name}={value}" for name, value in given.items()]


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def foreign_lines(done) -> list[str]:
    """What a run that is well shows and is not ours: neither its progress nor where the files are.

    Only stderr has the progress, and it ends with its one last line; no line is drawn over.
    """
    results = re.compile(r"(W&B|curves|samples|checkpoint) +/.*|resumes from step \d+.*|removes \d .*")
    step = r"\S+: \d+ of \d+ steps \(\d+ %\), \S+ s(teps)?/s(tep)?"
    values = r"loss \S+, lr \S+, img/s \S+, data \d+%(, val mse \S+)?, to /\S+"
    minute, last = (re.compile(f"{step}, {time}, {values}") for time in (r"\d+ \S+ left", r"(\d+ of them )?in \d+ \S+"))
    told = [line for line in done.stderr.split("\n") if line]
    assert told, "stderr has the progress"
    *before, end = told
    foreign = [line for line in before if not minute.fullmatch(line)]
    foreign += [line for line in done.stdout.split("\n") if line and not results.fullmatch(line)]
    return foreign + ([] if last.fullmatch(end) else [end])


@pytest.fixture(scope="module")
def two_ranks(repo, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    done = launch(repo, data, run_dir, "wandb.mode=offline", "ema_snapshot_every=2", ranks=2)
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
    assert {f"{name}_q{i}" for name in ("mse", "mse_mean") for i in range(4)} <= set().union(*lines)
    assert abs(lines[0]["mse"] - 1) < 0.15, (
        "the zero-initialised net predicts no noise: the error is the noise's variance"
    )
    assert lines[0]["lr"] == pytest.approx(1e-4) and lines[1]["lr"] == pytest.approx(1e-3)
    assert lines[-1]["lr"] == pytest.approx(1e-6)
    for name in ("loss.png", "lr.png", f"samples/step-{STEPS:08d}.png"):
        assert Image.open(two_ranks / name).size[0] > 300
    assert list(two_ranks.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in complete_checkpoints(two_ranks)] == ["step-00000003", "step-00000006"]
    assert [path.name for path in sorted((two_ranks / "snapshots").iterdir())] == [
        f"step-0000000{i}" for i in (2, 4, 6)
    ]
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
    assert not foreign_lines(done)
    for made, stored in list(zip(metrics(tmp_path / "online"), metrics(two_ranks), strict=False))[:2]:
        assert made["loss"] == pytest.approx(stored["loss"], rel=1e-4)
    assert (tmp_path / "online" / "samples" / "step-00000003.png").exists()


@pytest.mark.slow
def test_a_cache_of_states_changes_no_bit_also_where_a_run_resumes(data, tmp_path):
    """96 scenes, 32 a step: after three steps every caption was seen. A resumed run begins with an empty cache."""
    from train.engine import init_distributed  # here: the others run in processes of their own
    from train.loop import train

    text = tmp_path / "text"
    embed(Embed("", str(text), str(data / "t5"), 16, "float32", "float32", mode="meta"))
    rank, ranks, device = init_distributed()
    states = []
    for name, cache, starts in (("without", 0, 1), ("with", 0.01, 1), ("resumed", 0.01, 2)):
        given = [
            *SMALL, "steps=8", "save_every=4", "global_batch=32", "micro_batch=32", "model.image_size=16",
            "model.attention_resolutions=[8]", "data.cond_drop_prob=0", "text.mode=online", f"text.cache_gb={cache}",
            f"data.shards={data / 'shards'}", f"data.text={text}", f"run_dir={tmp_path / name}",
            "wandb.mode=disabled",
        ]  # fmt: skip
        config = compose_config(list({o.split("=")[0]: o for o in given}.values()))
        for start in range(starts):
            if start:
                shutil.rmtree(latest_checkpoint(tmp_path / name))
            inputs = find_inputs(config)
            add_missing_digests(inputs.datasets)
            assert train(config, inputs, rank, ranks, device)
        states.append(load_file(latest_checkpoint(tmp_path / name) / "rank-00000.safetensors"))
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())
    shares = {name: [line.get("text_cache_share") for line in metrics(tmp_path / name)] for name in ("without", "with")}
    assert shares == {"without": [None] * 8, "with": [0.0] * 3 + [1.0] * 5}
    assert [line["text_cache_share"] for line in metrics(tmp_path / "resumed")][-4:-2] == [0.0, 0.0], "it has none yet"


def test_bf16_follows_fp32(repo, data, two_ranks, tmp_path):
    done = launch(repo, data, tmp_path / "bf16", "wandb.mode=disabled", "precision=bf16", "steps=3", "-q")
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    assert f"checkpoint  {tmp_path / 'bf16'}" in done.stdout, "the results stay"
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


def test_a_rerun_goes_on_bit_identically(repo, data, held_out, two_ranks, alone, tmp_path):
    run_dir = tmp_path / "again"
    shutil.copytree(two_ranks, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    # What a start that died beyond its last checkpoint leaves: later metrics, half a line, half a checkpoint.
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    (run_dir / "checkpoints" / "step-00000006.part").mkdir()
    # What is kept for backward may change on the way, and the run may validate: no single bit is another.
    allowed = ("wandb.mode=disabled", "recompute=cheap", "validate_every=2", "ema_snapshot_every=2")
    done = launch(repo, data, run_dir, *allowed, *held_out, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "removes 2 snapshots of the averages after step 3, where this start goes on" in done.stdout
    assert "removes 1 sample grid after step 3, where this start goes on" in done.stdout
    assert not foreign_lines(done)
    names = ("step", "loss", "mse", "vb", "lr", "grad_norm")
    assert [[line[n] for n in names] for line in metrics(run_dir)] == [
        [line[n] for n in names] for line in metrics(two_ranks)
    ]
    for rank in range(2):
        file = f"checkpoints/step-00000006/rank-{rank:05d}.safetensors"
        before, after = load_file(two_ranks / file), load_file(run_dir / file)
        assert {"master", "ema", *TRACKED, "moments.state1", "moments.absmax2"} <= set(before)
        assert before["moments.state1"].dtype == torch.uint8, "8-bit moments"
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
        for step in (2, 4, 6):
            snapshot = f"snapshots/step-{step:08d}/rank-{rank:05d}.safetensors"
            assert (run_dir / snapshot).read_bytes() == (two_ranks / snapshot).read_bytes()
        halved = load_file(run_dir / snapshot)
        assert set(halved) == set(TRACKED)
        for name, value in halved.items():
            assert torch.equal(value, before[name].half()) and not torch.equal(before[name], before["ema"])
    # The average on two ranks, whose parts are uneven, is validated to what one rank finds in its checkpoint.
    validated = [line for line in metrics(run_dir) if "validation/mse" in line]
    assert [line["step"] for line in validated] == [4, 6]
    config = compose_config([o for o in SMALL if "sample" not in o] + [f"data.text={data / 'text'}", *held_out])
    found, checkpoint = config.data.validation, Checkpoint.open(run_dir)
    samples = HeldOut(
        config.data, [Dataset(find_shards(found.shards), found.text)], checkpoint.text, image_size=32,
        samples=found.samples, micro_batch=4,
    )  # fmt: skip
    unet = load_net(checkpoint, "ema", torch.device("cpu"))
    of_one = validation_losses(unet, Diffusion(1000), samples, lambda text: text, torch.device("cpu"))
    assert {name: validated[-1][name] for name in of_one} == pytest.approx(of_one, rel=1e-12)
    assert len(of_one) == 13 and of_one["validation/mse"] < validated[0]["validation/mse"] < 1


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


def test_a_checkpoint_is_a_state_dict_of_the_released_names(two_ranks):
    checkpoint = Checkpoint.open(two_ranks)
    assert checkpoint.manifest["versions"]["if-stage1-train"] == project_version()
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


def test_the_copies_of_averages_and_of_a_snapshot_are_counted(data):
    """Two averages in fp32 and in fp16, of a rank's half of the parameters."""
    given = [o for o in SMALL if "sample" not in o] + [f"data.text={data / 'text'}"]
    without, tracking = (compose_config([*given, f"ema_snapshot_every={every}"]) for every in (0, 5))
    for config in (without, tracking):
        resolve_text_shape(config)
    host = [needed_bytes(config, 2, 1_000_000, 0, on_gpu=True)[1] for config in (without, tracking)]
    assert host[1] - host[0] == (8 + 4) * 500_000


def test_the_memory_of_a_rank_is_told_before_it_is_taken(repo, data, two_ranks):
    """The peak of a real rank, libraries included, against the estimate of dry_run."""
    config = compose_config([o for o in SMALL if "sample" not in o] + [f"data.text={data / 'text'}"])
    resolve_text_shape(config)
    needed = sum(needed_bytes(config, 2, *parameters(config), on_gpu=False))
    measured = metrics(two_ranks)[-1]["memory_gb"] * 1e9
    assert 0.6 * measured < needed < 1.7 * measured, (needed, measured)
