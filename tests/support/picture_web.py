"""A web server on loopback with pictures good and bad, and the table of their addresses that img2dataset takes."""

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.prepare.scenes import describe, draw

# Of each 20 addresses: one that is not there, one of a page of text, one of a cut file, one of a picture of 32 px.
MISSING, PAGE, CUT, TINY = 3, 7, 11, 15
GOOD = 16 / 20
# What else a JPEG's address brings: pictures in these formats, which img2dataset makes JPEGs of.
FORMATS = {5: "PNG", 9: "WEBP"}


def write_web(folder: Path, pictures: int, photos: Path | None = None) -> Path:
    """Write the files of the server to folder/www, which is returned.

    photos: a folder of large JPEGs, of which windows in sizes as on the web are cut; drawn scenes by default.
    """
    www = folder / "www"
    www.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(photos.rglob("*.jpg"))[:8]] if photos else []
    for i in range(pictures):
        kind = i % 20
        if kind == MISSING:
            continue
        picture = _window(sources[i % len(sources)], rng) if sources else draw(describe(0, i))
        data = io.BytesIO()
        (picture.resize((32, 32)) if kind == TINY else picture).save(data, FORMATS.get(kind, "JPEG"), quality=85)
        held = data.getvalue()
        held = b"<html>not here</html>" if kind == PAGE else held[: len(held) // 3] if kind == CUT else held
        (www / f"{i:05d}.jpg").write_bytes(held)
    return www


def write_table(path: Path, url: str, pictures: int) -> None:
    """A .parquet of addresses and captions with scores, as LAION's."""
    rng = np.random.default_rng(1)
    rows = {
        "URL": [f"{url}/{i:05d}.jpg" for i in range(pictures)],
        "TEXT": [describe(0, i).caption for i in range(pictures)],
        "similarity": rng.uniform(0.2, 0.4, pictures),
        "punsafe": rng.uniform(0, 1, pictures),
        "pwatermark": rng.uniform(0, 1, pictures),
    }
    pq.write_table(pa.table(rows), path)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files, which runs in a process of its own."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout
            yield server.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        finally:
            server.terminate()


def img2dataset_arguments(table: Path, out: Path, **more: object) -> list[str]:
    """The options of docs/guide/from_urls.md.  more: options in place of these, or beside them."""
    options: dict[str, object] = {
        "url_list": table, "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT",
        "save_additional_columns": '["similarity","punsafe","pwatermark"]',
        "output_format": "webdataset", "output_folder": out,
        "resize_mode": "keep_ratio", "image_size": 256, "resize_only_if_bigger": True, "encode_quality": 95,
        "min_image_size": 64, "max_aspect_ratio": 3, "timeout": 10, "retries": 1,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in {**options, **more}.items()]


def status_counts(shards: Path) -> list[tuple[str, int]]:
    """What img2dataset's stats files say of the addresses, the most frequent first."""
    stats = [json.loads(path.read_text()) for path in shards.glob("*_stats.json")]
    return sum((Counter(one["status_dict"]) for one in stats), Counter()).most_common()


def _window(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of a photo, reduced to a size as on the web: a short side of 240 to 1,000 px."""
    short = int(rng.integers(240, 1001))
    width, height = short, int(short * rng.uniform(1, 1.8))
    if rng.random() < 0.6:
        width, height = height, width
    scale = min(1.0, photo.width / width, photo.height / height) * rng.uniform(0.5, 1)
    w, h = int(width * scale), int(height * scale)
    x, y = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
    return photo.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BICUBIC)
