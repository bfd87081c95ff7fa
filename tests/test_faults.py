"""Faults in real trainings, the short form of tests.chaos: nothing is lost, and each fault is reported."""

import io
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.cli import REQUEUE
from data.storage.tars import read_shard, write_shard
from tests.chaos import TINY, Run, ask_a_rank, damage, differences, kill_a_rank_that_saves, kill_a_worker
from tests.support.trainings import launch, make_data, metrics, rank_processes, start
from train.checkpoint.format import complete_checkpoints, latest_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_what_a_launcher_has_forked_is_no_rank_before_it_has_its_number(tmp_path):
    (tmp_path / "deepspeed.launcher.launch").write_text("RANK=1 sleep 60 & RANK=0 sleep 60 & sleep 60 & wait\n")
    named = ["python", "-u", "-m", "deepspeed.launcher.launch"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    with subprocess.Popen(named, executable="/bin/sh", cwd=tmp_path, env=environment) as launched:
        launcher = psutil.Process(launched.pid)
        while len(forked := [child for child in launcher.children() if child.name() == "sleep"]) < 3:
            time.sleep(0.01)
        try:
            numbers = [rank.environ()["RANK"] for rank in rank_processes(launched)]
        finally:
            for process in (*forked, launcher):
                process.kill()
    assert numbers == ["0", "1"]


def test_a_run_with_kills_signals_and_damage_equals_an_undisturbed_one(repo, data, tmp_path):
    draw, steps, run_dir = random.Random(0), "steps=40", tmp_path / "disturbed"
    done = launch(repo, data, tmp_path / "undisturbed", *TINY, steps, ranks=2)
    assert done.returncode == 0 and (tmp_path / "undisturbed/done").exists(), done.stderr[-3000:]
    for fault in (kill_a_rank_that_saves, ask_a_rank, kill_a_worker):
        run = Run(data, run_dir, steps)
        run.wait_for(4)
        tree = run.tree()
        fault(run, draw)
        status = run.end(tree)
        assert status == (REQUEUE if fault is not kill_a_rank_that_saves else status) != 0, run.said()[-3000:]
        assert not (run_dir / "done").exists()
    newest = latest_checkpoint(run_dir)
    damage(newest, "rank-00001.safetensors", draw)
    done = launch(repo, data, run_dir, *TINY, steps, ranks=2)
    assert done.returncode == 0 and (run_dir / "done").exists(), done.stderr[-3000:]
    assert f"DAMAGED CHECKPOINT '{newest}': the contents of rank-00001.safetensors" in done.stderr
    assert newest.with_suffix(".damaged").exists()
    assert not differences(run_dir, tmp_path / "undisturbed")
    assert 0 < max(line["save_stall_share"] for line in metrics(run_dir)) < 1


def test_a_loss_that_is_not_finite_is_skipped_by_all_ranks_or_ends_the_run(repo, data, tmp_path):
    huge = tmp_path / "huge"
    shutil.copytree(data, huge)
    tar = sorted((huge / "text").glob("*.tar"))[1]
    samples = list(read_shard(str(tar), {"npy"}))
    key = samples[0][0]
    array = np.load(io.BytesIO(samples[0][1]["npy"]))
    raw = samples[0][1]["npy"]
    samples[0][1]["npy"] = raw[: len(raw) - array.nbytes] + np.full_like(array, 3e38).tobytes()
    write_shard(tar, samples)
    # Each of the 96 samples comes once in 12 steps of 8.
    overrides = (*TINY, "steps=12", "data.cond_drop_prob=0")
    done = launch(repo, huge, tmp_path / "run", *overrides, "max_skipped=1", ranks=2)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "1 steps in a row had no finite loss and gradient" in done.stderr and key in done.stderr
    assert "lower optim.lr_peak" in done.stderr
    done = launch(repo, huge, tmp_path / "run", *overrides, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics(tmp_path / "run")
    (skipped,) = [line["step"] for line in lines if line["skipped_steps"]]
    assert [line["step"] for line in lines] == list(range(1, 13))
    # The schedule skips the step too: the next step has the same learning rate.
    assert lines[skipped]["lr"] == lines[skipped - 1]["lr"]
    assert np.isfinite(lines[-1]["loss"])
    assert any(key in file.read_text() for file in (tmp_path / "run/quarantine").iterdir())


@pytest.mark.slow
def test_a_hang_ends_with_the_stacks_of_every_rank(repo, data, tmp_path):
    run = Run(data, tmp_path / "run", "steps=1000", "hang_seconds=5")
    run.wait_for(2)
    ranks, tree = run.ranks(), run.tree()
    ranks[1].send_signal(signal.SIGSTOP)
    until = time.monotonic() + 60
    while "rank 0: HANGS" not in run.said() and time.monotonic() < until:
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGCONT)
    assert run.end(tree) != 0
    said = run.said()
    assert "rank 0: HANGS, no progress for 5 s" in said and "rank 0 |   File" in said and "in train" in said
    assert "rank 1: HANGS" in said and "rank 1 |   File" in said


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_optimizer(repo, data, tmp_path):
    batch = ("global_batch=12", "micro_batch=2", "steps=24", "save_every=6", "keep_checkpoints=9", "log_every=1")
    quiet = ("wandb.mode=disabled", *batch)
    done = launch(repo, data, tmp_path / "two", *quiet, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "changing"
    shutil.copytree(tmp_path / "two", run_dir)
    for last_step, ranks, name in ((6, 1, "adamw8bit"), (12, 3, "adamw"), (18, 2, "adamw8bit")):
        for folder in complete_checkpoints(run_dir):
            if int(folder.name[5:]) > last_step:
                shutil.rmtree(folder)
        done = launch(repo, data, run_dir, *quiet, f"optim.name={name}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(metrics(run_dir), metrics(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3), ours["step"]


@pytest.mark.slow
def test_a_full_or_vanished_disk_is_reported_and_saved_checkpoints_stay(repo, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        done = launch(repo, data, disk / "run", *TINY, "steps=200", "keep_checkpoints=100", ranks=2)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "could not be written" in done.stderr and "those before are intact" in done.stderr
        saved = complete_checkpoints(disk / "run")
        assert saved and not list((disk / "run/checkpoints").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = launch(repo, data, disk / "run", *TINY, "steps=200", ranks=2)
        assert done.returncode != 0 and "ead-only" in done.stderr
        subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
        assert complete_checkpoints(disk / "run") == saved
        run = start(repo, data, disk / "run", *TINY, "steps=400", ranks=2)
        while latest_checkpoint(disk / "run") == saved[-1] and run.poll() is None:
            time.sleep(0.1)
        subprocess.run(["umount", "-l", disk], check=True)
        out, _ = run.communicate(timeout=200)
        assert run.returncode != 0, out[-2000:]
    finally:
        subprocess.run(["umount", "-l", disk], capture_output=True)
