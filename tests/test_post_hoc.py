"""Averages of any length after the run: against really tracked ones, over ranks and resumes; and what is refused."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.text.meta import TextMeta
from tests.checkpoints import changed_run, write_checkpoint
from tests.support.trainings import launch, make_data
from tests.test_ema import engines_of
from train.checkpoint import post_hoc
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import SNAPSHOTS, check_weights, step_folder, step_folders, step_of
from train.checkpoint.post_hoc import MOST_LEFT, ROUNDING, open_checkpoint, with_averages
from train.checkpoint.writer import SNAPSHOT_DTYPE
from train.config import Config
from train.ema import EMA
from train.weights.power_average import TRACKED, coefficients, decay, gamma_of

SIZE, STEPS, EVERY, EARLIER = 3001, 320, 10, 155
TEXT = asdict(TextMeta("t5", "", "", 16, 64, "float16", "float32", "if-1"))
LENGTHS = (0.035, 0.05, 0.07, 0.12, 0.2)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[int, dict[float, Tensor]]]:
    """Weights that move far and with noise at first, less later; snapshots by two ranks, then by three.

    Returns the folder of the run, and by step and length what was really tracked.
    """
    run_dir, generator = tmp_path_factory.mktemp("post_hoc") / "run", torch.Generator().manual_seed(0)
    config = asdict(Config(run_dir=str(run_dir), ema_snapshot_every=EVERY))
    weights, target = (torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    engine, tracked, found = engines_of(weights.float(), 1)[0], dict.fromkeys(LENGTHS, 0.0 * weights), {}
    ema = EMA(engine, 0.99, tracked=True)
    for step in range(1, STEPS + 1):
        rate = 0.03 * (1 + math.cos(math.pi * step / STEPS)) + 1e-4
        noise = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        weights += rate * (target - weights + noise)
        engine.master.data[:SIZE], engine.schedule_step = weights.float(), step
        ema.update(engine, step)
        for length, average in tracked.items():
            beta = decay(gamma_of(length), step)
            tracked[length] = beta * average + (1 - beta) * weights
        described = {"step": step, "schedule_step": step, "config": config, "text": TEXT}
        ranks = 2 if step <= EARLIER else 3
        parts = {
            name: [part.master.detach().clone() for part in engines_of(average[:SIZE], ranks)]
            for name, average in (ema.averages | {"master": engine.master.detach()}).items()
        }
        if step in (EARLIER, STEPS):
            own = [{name: values[rank] for name, values in parts.items()} for rank in range(ranks)]
            write_checkpoint(step_folder(run_dir, step), own, {"w": [SIZE]}, **described)
            found[step] = dict(tracked)
        if step % EVERY == 0:
            own = [{name: parts[name][rank].to(SNAPSHOT_DTYPE) for name in TRACKED} for rank in range(ranks)]
            write_checkpoint(step_folder(run_dir, step, SNAPSHOTS), own, {"w": [SIZE]}, **described)
    return run_dir, found


@pytest.mark.parametrize("step", [EARLIER, STEPS])
@pytest.mark.parametrize("length", LENGTHS)
def test_an_average_of_any_length_is_the_one_that_would_have_been_tracked(run, step, length):
    run_dir, tracked = run
    checkpoint = open_checkpoint(step_folder(run_dir, step), length)
    assert error(checkpoint.weights("ema")["w"], tracked[step][length]) < 1e-3
    assert checkpoint.title("ema") == f"ema of length {length:g}"
    # The average that the run kept is another one, and so are those of the other lengths.
    kept = Checkpoint.open(step_folder(run_dir, step)).weights("ema")["w"]
    assert error(kept, tracked[step][length]) > 3e-3
    assert torch.equal(checkpoint.weights("master")["w"], Checkpoint.read(checkpoint.folder).weights("master")["w"])


def test_a_tracked_length_is_read_as_it_was_tracked(run):
    run_dir, _ = run
    for name, length in TRACKED.items():
        own = Checkpoint.read(step_folder(run_dir, STEPS)).reader().read(name, 0, SIZE)
        torch.testing.assert_close(open_checkpoint(run_dir, length).weights("ema")["w"], own, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_made_is_refused_with_the_numbers(run, tmp_path):
    run_dir, _ = run
    with pytest.raises(
        ValueError, match=r"ema_length=0.01 .*step 320 and of 31 snapshots.*% off.*nearest .*is 0\.0\d+"
    ):
        open_checkpoint(run_dir, 0.01)
    shutil.copytree(run_dir / "checkpoints", tmp_path / "alone" / "checkpoints")
    with pytest.raises(ValueError, match=r"of step 320 and of 0 snapshots .*nearest length that can be made is 0\.05"):
        open_checkpoint(tmp_path / "alone", 0.06)
    open_checkpoint(tmp_path / "alone", 0.1).weights("ema")
    changed = step_folder(tmp_path / "alone", STEPS)
    shutil.copytree(changed, step_folder(tmp_path / "untracked", 7))
    off = changed_run(tmp_path / "untracked", tmp_path / "off", lambda m: m["config"].pop("ema_snapshot_every"))
    with pytest.raises(ValueError, match=r"ema_length=0.1 cannot .* tracked no power-function averages"):
        open_checkpoint(off, 0.1)
    for wrong, message in ((0.0, "above 0 and at most 0.28"), (0.4, "above 0"), (math.nan, "above 0")):
        with pytest.raises(ValueError, match=message):
            check_weights("ema", wrong)
    with pytest.raises(ValueError, match=r"weights=master and ema_length=0.1 are both given"):
        check_weights("master", 0.1)


def test_the_rounding_of_the_snapshots_counts(run, monkeypatch):
    """Of a short length the coefficients are large: what is left of its profile is little, what fp16 adds is not."""
    steps = [step for step in range(10, 2401, 10) for _ in TRACKED]
    (factors,), (left,) = coefficients(steps, [*TRACKED.values()] * 240, 2400, [0.005])
    assert left < MOST_LEFT < ROUNDING * np.linalg.norm(factors)
    checkpoint = Checkpoint.read(step_folder(run[0], STEPS))
    with_averages(checkpoint, [0.07, 0.05])
    monkeypatch.setattr(post_hoc, "ROUNDING", 1.0)
    with_averages(checkpoint, [0.05])  # of the checkpoint alone, in fp32
    with pytest.raises(ValueError, match=r"ema_length=0\.07 .* the rounding of the snapshots included"):
        with_averages(checkpoint, [0.05, 0.07])


def test_all_of_one_run_is_verified_once_for_several_lengths(run, monkeypatch):
    verified = []
    verify = Checkpoint.verify
    monkeypatch.setattr(Checkpoint, "verify", lambda one: verified.append(one.folder) or verify(one))
    made = with_averages(Checkpoint.read(step_folder(run[0], STEPS)), LENGTHS)
    for one in made:
        one.weights("ema")
    assert len(verified) == len(set(verified)) > 20


def test_a_snapshot_is_no_checkpoint_and_a_damaged_checkpoint_no_snapshot(run, tmp_path):
    snapshot = step_folder(run[0], 310, SNAPSHOTS)
    for length in (None, 0.05):
        with pytest.raises(ValueError, match=r"step-00000310' is a snapshot of averages: name a checkpoint of the run"):
            open_checkpoint(snapshot, length)
    shutil.copytree(run[0] / SNAPSHOTS, tmp_path / "run" / SNAPSHOTS)
    shutil.copytree(run[0] / "checkpoints", tmp_path / "disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    folder = step_folder(tmp_path / "run", STEPS)
    open_checkpoint(folder, 0.07)  # the snapshots beside a link to the checkpoints
    (folder / "rank-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"step-00000320' is not a whole checkpoint .*name another step-NNNNNNNN"):
        open_checkpoint(folder, 0.07)


def test_damaged_snapshots_are_named_and_the_others_are_enough(run, tmp_path):
    run_dir, tracked = tmp_path / "run", run[1]
    shutil.copytree(run[0], run_dir)
    flipped = step_folder(run_dir, 310, SNAPSHOTS) / "rank-00001.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-100] ^= 1
    flipped.write_bytes(data)
    (step_folder(run_dir, 300, SNAPSHOTS) / "manifest.json").unlink()
    for step in (300, 310):
        with pytest.raises(ValueError, match=rf"step-00000{step}.*damaged.*move it away"):
            open_checkpoint(run_dir, 0.07)
        shutil.rmtree(step_folder(run_dir, step, SNAPSHOTS))
    assert len(step_folders(run_dir, SNAPSHOTS)) == STEPS // EVERY - 2
    assert error(open_checkpoint(run_dir, 0.07).weights("ema")["w"], tracked[STEPS][0.07]) < 1e-3


@pytest.mark.slow
def test_averages_of_a_real_training_and_the_dtype_of_its_snapshots(repo, tmp_path):
    """Within a thousandth from fp16; bf16, as large on disk, is not enough. -s prints all."""
    data, lengths = make_data(tmp_path), "0.03,0.04,0.06,0.07,0.085,0.12,0.15,0.2,0.25"
    steps, run_dir = 240, tmp_path / "run"
    done = launch(
        repo, data, run_dir, "wandb.mode=disabled", f"steps={steps}", f"save_every={steps}", "ema_snapshot_every=10",
        "global_batch=4", "micro_batch=4", "model.image_size=16", "model.attention_resolutions=[8]", "check_every=0",
        "optim.warmup_steps=20", script=repo / "tests/support/tracked_run.py", before=(lengths,),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tracked = load_file(run_dir / "tracked.safetensors")
    for every, made in ((10, 8), (20, 6), (40, 4)):
        for folder in step_folders(run_dir, SNAPSHOTS):
            if step_of(folder) % every:
                shutil.rmtree(folder)
        found = measured_errors(run_dir, tracked)
        print_errors(every, found)
        assert len(found) == made
        for dtype, worst in ((torch.float32, 3e-4), (torch.float16, 1e-3)):
            assert max(errors[dtype] for errors in found.values()) < worst
        assert every > 10 or max(errors[torch.bfloat16] for errors in found.values()) > 1e-3


def measured_errors(run_dir: Path, tracked: dict[str, Tensor]) -> dict[str, dict[torch.dtype | str, float]]:
    """By length the errors, relative to the norm of the average, with the snapshots rounded to each dtype.

    "kept": that of the average which the run keeps anyway.
    """
    found: dict[str, dict[torch.dtype | str, float]] = {}
    for length, expected in sorted(tracked.items()):
        try:
            checkpoint = open_checkpoint(run_dir, float(length))
        except ValueError as refused:
            assert "the profile that comes nearest" in str(refused)
            continue
        kept = checkpoint.reader().read("ema", 0, len(expected))
        found[length] = {"kept": error(kept, expected)}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            total = torch.zeros_like(expected)
            for factor, reader, name in checkpoint.average.terms:
                value = reader.read(name, 0, len(expected))
                own = checkpoint.folder in reader._files[0].parents
                total += factor * (value if own else value.to(dtype)).double()
            found[length][dtype] = error(total, expected)
    return found


def print_errors(every: int, found: dict[str, dict[torch.dtype | str, float]]) -> None:
    for length, errors in found.items():
        print(f"| {every} | {length} |", " | ".join(f"{value:.1e}" for value in errors.values()), "|")
