"""Odd samples in otherwise sound tars: no caption, no image, a key or a file that comes twice."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.embed import Embed, embed
from data.loader.cursor import CAPTION_ALONE, RawSample, ShardCursor
from data.storage.shards import find_shards
from data.text.embeddings import from_bytes
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5

JPEG = b"\xff\xd8\xff picture of "


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    write_tiny_t5(TinyT5(out=str(folder)))
    return folder


def read(folder: Path, encoder: Path, names: list[str]) -> tuple[list[RawSample], TextMeta]:
    """The samples of a shard with these members, each content being the member's number, after data.embed."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, name in enumerate(names):
            content = JPEG + str(number).encode() if name.endswith("jpg") else f"{number} says the caption".encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    text = folder / "text"
    embed(Embed(str(folder), str(text), str(encoder), tokens=8, compute="float32", dtype="float32", batch=2))
    (shard,) = find_shards(folder)
    cursor = ShardCursor(shard, str(text))
    return [cursor.read(row) for row in range(shard.count)], TextMeta.read(text)


def test_a_sample_without_caption_is_left_out_and_costs_no_other(tmp_path, encoder):
    samples, _ = read(tmp_path / "d", encoder, ["a.jpg", "a.txt", "b.jpg", "c.jpg", "c.txt", "d.txt", "e.jpg", "e.txt"])
    assert [(s.name, s.problem) for s in samples] == [
        ("00000.tar:a", ""), ("00000.tar:b", "no embedding"), ("00000.tar:c", ""), ("00000.tar:d", CAPTION_ALONE),
        ("00000.tar:e", ""),
    ]  # fmt: skip


def test_a_file_that_comes_twice_in_a_sample_leaves_it_out(tmp_path, encoder):
    samples, _ = read(tmp_path / "d", encoder, ["a.jpg", "a.jpg", "a.txt", "b.jpg", "b.txt"])
    assert [s.problem for s in samples] == ["no image", ""]


def test_a_key_that_comes_again_is_another_sample_with_its_own_caption(tmp_path, encoder):
    samples, meta = read(tmp_path / "d", encoder, ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"])
    assert [(s.image, s.caption, s.problem) for s in samples] == [
        (JPEG + str(number).encode(), f"{number + 1} says the caption".encode(), "") for number in (0, 2, 4)
    ]
    first, _, again = (from_bytes(s.embedding.read(), meta) for s in samples)
    assert not np.array_equal(first, again)
