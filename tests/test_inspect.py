"""data.inspect: real shards, good and hostile, reported as they are and shown as the training sees them."""

import base64
import io
import os
import re
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.embed import Embed, embed
from data.inspect import Inspect, inspect
from data.inspection.contact_sheet import contact_sheet, printable
from data.inspection.findings import Tile, TrainingView, choose_rows, inspect_samples
from data.loader.dataset import find_datasets
from data.loader.stream import MicroBatches, micro_batches
from data.storage.shards import find_shards
from data.storage.tars import write_shard
from data.text.embeddings import to_bytes
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.support.terminal import on_terminal

TOKENS, DIM = 2, 4
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</figcaption><style>*{display:none}</style>&lt;b&gt;",
    "turned \u202egnp.exe\u2066 round \x00\x1b[31m\x07 and \ud83d".encode("utf-8", "surrogatepass").decode(
        "utf-8", "replace"
    ),
    "long " * 20_000,
    "שלום עולם",
    "family 👨\u200d👩\u200d👧",
    "two\r\nlines\u2028three",
)


def jpeg(number: int, size: tuple[int, int] = (90, 70), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_dataset(folder: Path) -> DataConfig:
    """Three shards: hostile captions; one fault of each kind; one that ends early."""
    odd = {
        "good": {"png": jpeg(1, (40, 80), "PNG", "L"), "txt": b"same caption"},
        "no_image": {"txt": b"same caption"},
        "empty_caption": {"jpg": jpeg(2), "txt": b"  \n"},
        "no_caption": {"jpg": jpeg(3)},
        "not_an_image": {"jpg": b"<html>404</html>", "txt": b"three words here"},
        "cut": {"jpg": jpeg(4)[:300], "txt": b"x"},
        "no_embedding": {"jpg": jpeg(5), "txt": b"y"},
        "nan": {"jpg": jpeg(6), "txt": b"z"},
        "shape": {"jpg": jpeg(7), "txt": b"w"},
        "two_faults": {"jpg": b"<html>404</html>"},
        "no_members": {"json": b"{}"},
    }
    shards = [
        {f"{n:04d}": {"jpg": jpeg(10 + n), "txt": caption.encode()} for n, caption in enumerate(HOSTILE)},
        odd,
        {f"{n:04d}": {"jpg": jpeg(30 + n), "txt": f"caption {n}".encode()} for n in range(6)},
    ]
    for number, samples in enumerate(shards):
        write_shard(folder / f"{number:05d}.tar", list(samples.items()))
        special = {"nan": np.full((TOKENS, DIM), np.nan, np.float32), "shape": np.zeros((TOKENS, DIM + 1), np.float32)}
        rows = [
            (key, {"npy": to_bytes(special.get(key, np.ones((TOKENS, DIM), np.float32)))})
            for key, members in samples.items()
            if "txt" in members and key != "no_embedding"
        ]
        write_shard(folder / "text" / f"{number:05d}.tar", rows)
    last = folder / "00002.tar"
    with tarfile.open(last) as tar:
        # Cut inside the header of the fifth sample: each has two files.
        end = tar.getmembers()[8].offset + 100
    os.truncate(last, end)
    TextMeta("an<b>encoder", "0", "0", TOKENS, DIM, "float32", "float32", "none").write(folder / "text")
    (folder / "text" / "empty.npy").write_bytes(to_bytes(np.zeros((TOKENS, DIM), np.float32)))
    return DataConfig(shards=str(folder), text=str(folder / "text"), tokens=TOKENS, streams=1, cond_drop_prob=0.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    return write_dataset(tmp_path_factory.mktemp("shards"))


def first_epoch(config: DataConfig, seed: int, image_size: int):
    """Pixels by visit, and the bad samples, as the training gets them."""
    datasets = find_datasets(config)
    n = datasets[0].samples
    stream = MicroBatches(
        config, datasets, TextMeta.read(config.text), image_size=image_size, seed=seed, global_batch=n, micro_batch=n
    )  # fmt: skip
    batch = next(micro_batches(stream, 0, pin_memory=False))
    return dict(zip(batch.visit.tolist(), batch.pixels, strict=True)), batch.bad


class Page(HTMLParser):
    """The tags, their attributes and the text of a page, as a browser's parser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.words += data


def test_bad_samples_are_those_of_the_training(config):
    shards = find_shards(config.shards)
    found = inspect_samples(shards, 0, TrainingView(16, 0.1, 3), config.text, TextMeta.read(config.text))
    assert sorted(found.bad) == sorted(first_epoch(config, 3, 16)[1])
    assert {name.split(":")[-1] for name, _ in found.bad} >= {
        "no_image", "no_caption", "not_an_image", "cut", "no_embedding", "nan", "shape", "00002.tar[5]"
    }  # fmt: skip
    assert found.inspected == 25 and found.captions["txt"].missing == 4


@pytest.mark.parametrize("seed", [0, 3])
def test_tiles_are_what_the_training_sees(config, seed):
    shards = find_shards(config.shards)
    seen, _ = first_epoch(config, seed, 16)
    tiles = inspect_samples(shards, 0, TrainingView(16, config.crop_shift, seed), "", None).tiles
    by_name = {tile.name: torch.from_numpy(tile.pixels) for tile in tiles}
    assert len(by_name) >= 15
    for visit, name in [(0, "00000.tar:0000"), (7, "00000.tar:0007"), (8, "00001.tar:good"), (21, "00002.tar:0002")]:
        assert by_name[name].equal(seen[visit])


def test_report_tells_what_is_there(config, tmp_path, capsys):
    inspect(Inspect(config.shards, str(tmp_path / "new" / "r.html"), config.text, samples=0))
    page = Page((tmp_path / "new" / "r.html").read_text())
    printed = capsys.readouterr().out
    assert "25 samples in 3 shards" in printed and "looked at all samples" in printed
    assert "4 missing or empty, 1 repeat another" in printed and "2 x 4 float32" in printed
    for words in (
        "not a JPEG or PNG",
        "embedding not finite",
        "00001.tar:no_image",
        "same caption",
        "PNG L",
        "90 x 70",
    ):
        assert words in page.words
    assert os.listdir(tmp_path / "new") == ["r.html"]


def test_captions_cannot_get_out_of_their_place(config, tmp_path):
    out = tmp_path / "r.html"
    inspect(Inspect(config.shards, str(out), config.text, samples=0))
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "svg", "base", "form"}
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert all(
            (value or "").startswith("data:image/png;base64,")
            for name, value in attributes.items()
            if name in ("src", "href")
        )
    assert "<script>alert(1)</script>" in page.words  # as text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u2028]", html)
    assert "[U+202E]gnp.exe[U+2066]" in page.words and "שלום עולם" in page.words and "👨\u200d👩\u200d👧" in page.words
    assert "long " * 45 not in html
    assert "an<b>encoder" in page.words


def test_pictures_in_the_page_are_the_tiles(config, tmp_path):
    out = tmp_path / "r.html"
    found = inspect(Inspect(config.shards, str(out), samples=0, image_size=32))
    sources = [a["src"] for tag, a in Page(out.read_text()).tags if tag == "img"]
    pictures = [Image.open(io.BytesIO(base64.b64decode((source or "").split(",")[1]))) for source in sources]
    assert len(pictures) == len(found.tiles)
    for picture, tile in zip(pictures, found.tiles, strict=True):
        assert (np.asarray(picture).transpose(2, 0, 1) == tile.pixels).all()


def test_sheet_alone(config, tmp_path):
    found = inspect(Inspect(config.shards, str(tmp_path / "sheet.png"), samples=0))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = found.tiles[0].pixels.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)
    assert (sheet[10:138, 10:138] == first).all()
    with pytest.raises(ValueError, match="none of the samples"):
        contact_sheet([])
    # A word wider than its picture is cut, not drawn over its neighbour.
    black = [
        Tile("a", {"txt": "W" * 300}, np.zeros((3, 64, 64), np.uint8)),
        Tile("b", {"txt": ""}, np.zeros((3, 64, 64), np.uint8)),
    ]
    assert (np.asarray(contact_sheet(black))[:138, 139:147] == 255).all()


@pytest.mark.parametrize(
    ("counts", "samples"),
    [
        ([5, 0, 7], 0),
        ([5, 0, 7], 4),
        ([5, 0, 7], 1),
        ([5, 0, 7], 1000),
        ([100] * 500, 2000),
        ([3] * 1000, 10),
        ([1], 5),
    ],
)
def test_samples_are_taken_evenly(counts, samples):
    rows = choose_rows(counts, samples)
    total = sum(len(r) for r in rows.values())
    assert all(r == sorted(set(r)) and r[0] >= 0 and r[-1] < counts[shard] for shard, r in rows.items())
    reach = sum(counts[shard] for shard in rows)
    assert total == (sum(counts) if samples == 0 else min(samples, reach)) and len(rows) <= 64
    if samples == 2000:
        assert len(rows) == 64 and max(rows) - min(rows) > 480 and {len(r) for r in rows.values()} <= {31, 32}


def test_shown_cuts_and_keeps():
    assert printable("a  b\tc\nd", 20) == "a b c d"
    assert printable("x" * 50, 10) == "x" * 9 + "…" and len(printable("y" * 10_000, 200)) == 200
    assert printable("\u202e\x00é\u0301", 40) == "[U+202E][U+0000]é\u0301"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"out": "r.pdf"}, "must end in .html"),
        ({"samples": -1}, "samples=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"crop_shift": float("nan")}, "crop_shift=nan"),
        ({"shards": "nowhere"}, "/nowhere': check the path, or make shards with"),
        ({"text": "nowhere"}, r"no text embeddings in '.*/nowhere'"),
    ],
)
def test_what_cannot_be_is_refused(config, tmp_path, wrong, said):
    args = {"shards": config.shards, "out": str(tmp_path / "r.html"), **wrong}
    with pytest.raises(ValueError, match=said):
        inspect(Inspect(**args))
    assert not os.listdir(tmp_path)


def test_command_and_ctrl_c(config, tmp_path, repo):
    command = [sys.executable, "-m", "data.inspect", f"out={tmp_path / 'r.html'}"]
    gone = subprocess.run([*command, "shards=nowhere"], cwd=repo, capture_output=True, text=True)
    assert gone.returncode == 2 and gone.stderr.startswith("error: no folder") and gone.stderr.count("\n") == 1
    many, large = tmp_path / "many", jpeg(0, (1500, 1500))
    for number in range(20):
        write_shard(many / f"{number:05d}.tar", [(f"{n:04d}", {"jpg": large}) for n in range(20)])
    terminal = on_terminal([*command, f"shards={many}", "samples=0"])
    terminal.wait_for("inspect:")
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    *_, bar, stopped, cursor = terminal.screen()
    assert bar.startswith("inspect: ") and (stopped, cursor) == ("stopped by Ctrl-C", "")
    assert os.listdir(tmp_path) == ["many"]


def test_real_pictures(shared, tmp_path, capsys):
    found = inspect(Inspect(str(shared / "data" / "fluent"), str(tmp_path / "r.html"), samples=200))
    assert "1,563 samples in 16 shards" in capsys.readouterr().out
    assert found.inspected == 200 and len(found.tiles) == 96 and not found.bad and found.kinds == {"JPEG RGB": 200}


def test_captions_that_the_cleaning_leaves_nothing_of_are_counted(tmp_path, capsys):
    image = io.BytesIO()
    Image.new("RGB", (80, 70)).save(image, "JPEG")
    captions = ("a red circle", "\u4e00\u4e2a\u5706", "")
    samples = [(f"{i}", {"jpg": image.getvalue(), "txt": text.encode()}) for i, text in enumerate(captions)]
    write_shard(tmp_path / "shards" / "00000.tar", samples)
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5")))
    embed(Embed(str(tmp_path / "shards"), str(tmp_path / "text"), str(tmp_path / "t5"), 8, "float32", "float32"))
    inspect(Inspect(str(tmp_path / "shards"), str(tmp_path / "page.html"), str(tmp_path / "text")))
    assert "captions: 1 are empty after cleaning=if-1" in capsys.readouterr().out
