"""The way of docs/guide/from_urls.md with the real img2dataset: from a table of addresses to a training."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.embed import Embed, embed
from data.images import decode
from data.index import Index, index
from data.storage.shards import find_shards
from data.storage.tars import read_shard
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.support.picture_web import GOOD, img2dataset_arguments, serve, status_counts, write_table, write_web
from tests.support.trainings import launch, metrics

pytestmark = pytest.mark.slow
ADDRESSES, IMAGE_SIZE = 60, 80


@pytest.fixture(scope="module")
def img2dataset() -> str:
    found = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")
    if not found:
        pytest.skip("needs img2dataset, in an environment of its own: name its command in IMG2DATASET")
    return found


def download(command: str, folder: Path) -> subprocess.CompletedProcess:
    options = img2dataset_arguments(
        folder / "urls.parquet", folder / "shards", number_sample_per_shard=20, image_size=IMAGE_SIZE
    )
    quiet = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run([command, *options], env=quiet, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def folder(img2dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that img2dataset wrote, and what they were made from."""
    folder = tmp_path_factory.mktemp("urls")
    with serve(write_web(folder, ADDRESSES)) as url:
        write_table(folder / "urls.parquet", url, ADDRESSES)
        done = download(img2dataset, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_what_the_web_brought_is_there_and_whole(folder: Path) -> None:
    assert status_counts(folder / "shards") == [
        ("success", GOOD * ADDRESSES), ("Image decoding error", 6), ("HTTP Error 404: File not found", 3),
        ("image too small", 3),
    ]  # fmt: skip
    table = {row["URL"]: row for row in pq.read_table(folder / "urls.parquet").to_pylist()}
    resized = 0
    for shard in find_shards(folder / "shards"):
        for key, members in read_shard(shard.location, {"jpg", "txt", "json"}):
            facts, image = json.loads(members["json"]), decode(members["jpg"])
            row = table[facts["url"]]
            assert members["txt"].decode() == row["TEXT"]
            assert all(facts[name] == row[name] for name in ("similarity", "punsafe", "pwatermark"))
            assert image.size == (facts["width"], facts["height"]) and min(image.size) <= IMAGE_SIZE
            # Neither cropped nor in a border: the sides are as they were, to a pixel.
            scale = min(1, IMAGE_SIZE / min(facts["original_width"], facts["original_height"]))
            assert abs(image.width - scale * facts["original_width"]) <= 1, key
            assert abs(image.height - scale * facts["original_height"]) <= 1, key
            resized += scale < 1
    assert resized > 10


def test_an_index_in_its_folder_stops_img2dataset_until_it_is_removed(folder: Path, img2dataset: str) -> None:
    """As the guide says: it takes every .json there for the stats file of a shard."""
    index(Index(str(folder / "shards"), workers=1))
    assert [shard.count for shard in find_shards(folder / "shards")] == [16, 16, 16]
    stopped = download(img2dataset, folder)
    assert stopped.returncode and "index.json" in stopped.stderr
    (folder / "shards" / "index.json").unlink()
    assert download(img2dataset, folder).returncode == 0


def test_a_training_runs_on_it(folder: Path, repo: Path) -> None:
    index(Index(str(folder / "shards"), workers=1))
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 16, "float32", "float32"))
    dry = launch(repo, folder, folder / "run", "dry_run=true")
    assert dry.returncode == 0 and "48" in dry.stdout, dry.stderr[-2000:]
    done = launch(repo, folder, folder / "run", "steps=3")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = metrics(folder / "run")
    assert math.isfinite(lines[-1]["loss"]) and not any(line.get("bad_samples") for line in lines)
