"""What is sent to W&B, read back from the files of a real offline run; metrics.jsonl has the same lines."""

import json
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from train.config import Config, WandbConfig
from train.monitor.plots import plot_grid
from train.monitor.run_log import STARTS
from train.monitor.tracker import Tracker


def records(run_dir: Path) -> list[wandb_internal_pb2.Record]:
    """All records of the run in order: its file is a LevelDB log of protobuf messages in blocks of 32 KiB."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data, at, parts, found = path.read_bytes(), 7, b"", []
    assert not data or data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[wandb_internal_pb2.Record]]:
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 15, "loss": 0.9}\n{"step": 2')
    (run_dir / "samples").mkdir()
    grids = [run_dir / "samples" / f"step-{step:08d}.png" for step in (5, 10, 15)]
    for grid in grids:
        grid.touch()
    tracker = Tracker(Config(run_dir=str(run_dir), wandb=WandbConfig(mode="offline")), run_dir, 10)
    assert [grid.exists() for grid in grids] == [True, True, False], "the last one is of a step that is made again"
    assert tracker.lines == [{"step": 5, "loss": 1.0}]
    tracker.log(20, {"loss": 0.5, "bad/no caption": 3.0, "seconds_data": 0.1})
    Image.new("RGB", (4, 4)).save(run_dir / "grid.png")
    tracker.image(20, "samples", run_dir / "grid.png")
    tracker.alert("loss spike", "step 20: loss 7")
    tracker.close()
    for _ in range(200):  # W&B's own process may write on for a moment
        found = records(run_dir)
        if any(record.HasField("exit") for record in found):
            break
        time.sleep(0.1)
    return run_dir, found


def test_metrics_are_sent_with_their_step(run):
    run_dir, found = run
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    line = next(row for row in rows if "loss" in row)
    assert (line["step"], line["loss"], line["bad/no caption"]) == (20, 0.5, 3.0)
    assert any(any(key.startswith("samples") for key in row) for row in rows)
    assert [json.loads(text)["step"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()] == [5, 20]
    steps = [record.metric for record in found if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in steps)


def test_an_alert_is_sent(run):
    (alert,) = [record.alert for record in run[1] if record.HasField("alert")]
    assert (alert.title, alert.text, alert.level) == ("mine: loss spike", "step 20: loss 7", "ERROR")


def test_configuration_code_and_launch_line_are_recorded(run):
    run_dir, found = run
    (settings,) = [record.run for record in found if record.HasField("run")][:1]
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in settings.config.update}
    assert config["global_batch"] == 3072 and config["optim"]["lr_peak"] == 5e-5
    assert config["start"]["launch"] and config["start"]["packages"]["torch"] and config["start"]["step"] == 10
    assert settings.run_group == "mine"
    (start,) = [json.loads(text) for text in (run_dir / STARTS).read_text().splitlines()]
    assert start["config"]["global_batch"] == 3072 and {**start, "config": 0} == {**config["start"], "config": 0}


@pytest.mark.slow  # W&B tries for a minute and a half
def test_without_a_network_a_run_is_recorded_for_later(tmp_path, monkeypatch, caplog):
    for name, value in (("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", "a" * 40), ("INIT_TIMEOUT", "1")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = Tracker(Config(wandb=WandbConfig(mode="online")), tmp_path, 0)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert "W&B CANNOT BE REACHED" in caplog.text and "`wandb sync` sends it later" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_a_full_disk_leaves_the_metrics_and_figures_before(tmp_path):
    lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1000))
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "grid.png").write_bytes(b"before")
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"'.*metrics.jsonl' could not be written .*: make space"):
            Tracker(Config(wandb=WandbConfig(mode="disabled")), tmp_path, 990)
        with pytest.raises(OSError, match=r"'.*grid.png' could not be written .*: make space"):
            plot_grid(images, ["a caption"] * 4, "title", tmp_path / "grid.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_text() == lines and (tmp_path / "grid.png").read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "grid.png"}
