"""The film of sample grids in the report."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from train.monitor import film as film_module
from train.monitor.film import FRAMES, LAST, MILLISECONDS, film, spread
from train.report import Report, write_report


def png(level: int, width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_run(folder: Path, *levels: int) -> Path:
    """A run with a grid of each level of red, at steps 0, 1, ..., and one line of metrics."""
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for step, level in enumerate(levels):
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(png(level))
    return folder


def report(folders: list[Path], out: Path) -> None:
    write_report(Report([str(folder) for folder in folders], str(out)))


def frames(gif: bytes) -> list[np.ndarray]:
    return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(io.BytesIO(gif)))]


def films(page: Path) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(r'src="data:image/gif;base64,([^"]+)"', page.read_text())]


def test_the_page_shows_the_grids_as_a_film(tmp_path):
    report([write_run(tmp_path / name, 0, 80, 160) for name in ("one", "two")], tmp_path / "out.html")
    shown = films(tmp_path / "out.html")
    assert len(shown) == 2 and "As a film: 3 grids from step 0 to 2 (0.0 MB)" in (tmp_path / "out.html").read_text()
    for gif in shown:
        assert [frame[5, 5].tolist() for frame in frames(gif)] == [[0, 0, 0], [80, 0, 0], [160, 0, 0]]
        picture = Image.open(io.BytesIO(gif))
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
        assert times == [MILLISECONDS, MILLISECONDS, LAST] and picture.info["loop"] == 0, "again and again"


def test_a_grid_alone_is_no_film_and_one_that_is_damaged_is_told(tmp_path):
    run = write_run(tmp_path / "run", 0, 100, 200)
    (run / "samples" / "step-00000002.png").write_bytes(png(200)[:60])
    report([run], tmp_path / "out.html")
    assert "As a film: 2 grids from step 0 to 2, 1 damaged or too large" in (tmp_path / "out.html").read_text()
    (run / "samples" / "step-00000001.png").unlink()
    report([run], tmp_path / "out.html")
    assert not films(tmp_path / "out.html") and "film" not in (tmp_path / "out.html").read_text().split("<script")[0]


def test_grids_of_other_sizes_keep_their_scale():
    gif, count = film([png(100), png(200, 60, 20)])
    first, second = frames(gif)
    assert count == 2 and first.shape == second.shape == (30, 60, 3)
    assert first[29, 39].tolist() == [100, 0, 0] and first[0, 45].tolist() == [255] * 3
    assert second[10, 59].tolist() == [200, 0, 0] and second[25, 5].tolist() == [255] * 3


def test_a_film_of_many_large_grids_stays_small(tmp_path, monkeypatch):
    report([write_run(tmp_path / "run", *range(100))], tmp_path / "out.html")
    (gif,) = films(tmp_path / "out.html")
    shown = [int(frame[5, 5, 0]) for frame in frames(gif)]
    assert len(shown) == FRAMES and (shown[0], shown[-1]) == (0, 99) and shown == sorted(set(shown))
    noise = []
    for seed in range(4):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 100, 3), np.uint8)).save(file, "PNG")
        noise.append(file.getvalue())
    monkeypatch.setattr(film_module, "WIDTHS", (100, 50, 25))
    assert frames(film(noise)[0])[0].shape == (50, 100, 3)
    monkeypatch.setattr(film_module, "BYTES", 10_000)
    assert len(film(noise)[0]) <= 10_000 and frames(film(noise)[0])[0].shape == (25, 50, 3)


def test_what_is_spread_begins_and_ends_with_the_first_and_the_last():
    for count in (1, 2, 3, 24, 25, 1000):
        chosen = spread(count, 24)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(count, 24)
        assert (chosen[0], chosen[-1]) == (0, count - 1)
