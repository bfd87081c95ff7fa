"""What is written for TensorBoard, read back by TensorBoard itself; what a later start leaves of an earlier one."""

import json
import math
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.config import Config, WandbConfig
from train.monitor.tracker import SAMPLE_GRID, Tracker

pytest.importorskip("tensorboard", reason="needs the package tensorboard: pip install -e '.[tensorboard]'")
CONFIG = Config(wandb=WandbConfig(mode="disabled"), tensorboard=True)


def read(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of each name in the order in which TensorBoard's own loader, which forgets nothing, finds them."""
    from tensorboard.backend.event_processing.directory_loader import DirectoryLoader
    from tensorboard.backend.event_processing.event_file_loader import TimestampedEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    points: dict[str, list[tuple[int, float]]] = {}
    for event in DirectoryLoader(str(run_dir / "tensorboard"), TimestampedEventFileLoader).Load():
        for value in event.summary.value:
            content = make_ndarray(value.tensor)
            points.setdefault(value.tag, []).append((event.step, content if content.ndim else content.item()))
    return points


def grid(run_dir: Path, level: int) -> Path:
    Image.new("RGBA", (6, 4), (level, 0, 0, 255)).save(run_dir / "grid.png")
    return run_dir / "grid.png"


def test_tensorboard_reads_what_metrics_jsonl_has(tmp_path):
    tracker = Tracker(CONFIG, tmp_path, 0)
    line = {
        "loss": 0.5,
        "validation/mse": 0.25,
        "bad/no caption": 3.0,
        "lr": 5e-9,
        "samples": 24.0,
        "straggler_node": "node 7",
    }
    tracker.log(10, line)
    found = read(tmp_path)  # a line is there at once, whatever ends the training
    tracker.log(20, {"loss": math.nan})
    tracker.image(20, SAMPLE_GRID, grid(tmp_path, 200))
    tracker.close()
    words = found.pop("straggler_node/text_summary")
    assert words[0][0] == 10 and words[0][1].tolist() == [b"node 7"]
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for name, points in found.items():
        assert points == [(10, pytest.approx(logged.pop(name), rel=1e-6))], name
    assert set(logged) == {"step", "straggler_node"}
    found = read(tmp_path)
    assert [step for step, _ in found["loss"]] == [10, 20] and math.isnan(found["loss"][1][1])
    ((step, (width, height, picture)),) = found[SAMPLE_GRID]
    (tmp_path / "read.png").write_bytes(picture)
    pixels = np.asarray(Image.open(tmp_path / "read.png"))
    assert (step, width, height) == (20, b"6", b"4") and pixels[0, 0].tolist() == [200, 0, 0, 255]


def test_a_later_start_leaves_no_step_that_is_made_again(tmp_path):
    """After a kill, a rollback, a checkpoint that is passed over: steps are made again, and may be logged otherwise."""
    first = Tracker(CONFIG, tmp_path, 0)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": float(step)} | ({"bad/no caption": 1.0} if step == 30 else {}))
        first.image(step, SAMPLE_GRID, grid(tmp_path, step))
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])  # a crash leaves the last event unfinished
    second = Tracker(CONFIG, tmp_path, 40)
    assert whole - 3 > path.stat().st_size > whole / 2, "only the unfinished event is cut off"
    second.log(45, {"loss": 0.45})
    third = Tracker(CONFIG, tmp_path, 20)
    third.log(45, {"loss": 0.5})
    found = read(tmp_path)
    assert [step for step, _ in found[SAMPLE_GRID]] == [10, 20] and "bad/no caption" not in found
    assert found["loss"] == [(10, 10.0), (20, 20.0), (45, 0.5)]


def test_an_open_tensorboard_forgets_the_steps_that_are_made_again(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    Tracker(CONFIG, tmp_path, 0).log(30, {"loss": 3.0, "bad/no caption": 1.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Tensors("bad/no caption")] == [30]
    Tracker(CONFIG, tmp_path, 20).log(25, {"loss": 2.5})
    shown.Reload()
    assert [event.step for event in shown.Tensors("loss")] == [25] and not shown.Tensors("bad/no caption")


def test_a_disk_that_fills_up_ends_no_training(tmp_path, caplog):
    tracker = Tracker(CONFIG, tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for step in range(1, 40):
            tracker._events.log(step, {"loss": 0.5, "mse": 0.5})
    finally:
        tracker.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (told,) = [record.message for record in caplog.records if record.name == "train.monitor.event_files"]
    assert re.fullmatch(r"nothing more is written for TensorBoard in this start: '.*': .* File too large", told)
    Tracker(CONFIG, tmp_path, 1).log(2, {"loss": 2.0})
    assert read(tmp_path)["loss"] == [(1, 0.5), (2, 2.0)]
