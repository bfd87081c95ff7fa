"""A shard and its sidecar, read side by side: rows in any order forwards, and what is made of what can't be read."""

import io
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader.cursor import CAPTION_ALONE, RawSample, ShardCursor, ShardUnreadable
from data.storage import clients, locations, retries
from data.storage.shards import Shard
from data.storage.tars import Span, scan_shard, stats_path, write_shard
from data.text.embeddings import read_empty
from data.text.meta import TextMeta, check_sidecars

pytest_plugins = ["tests.support.faulty_server"]

ROWS = 30


def embedding(n: int, size: int = 5000) -> bytes:
    return bytes([n]) * size


def write(folder: Path, uncaptioned: set[int] = frozenset(), sizes: tuple[int, ...] = (5000,)) -> Shard:
    """A shard of ROWS samples and a sidecar whose embeddings have the given sizes in turn; some have no caption."""
    images = [
        (f"{n:05d}", {"jpg": b"image %d" % n} | ({} if n in uncaptioned else {"txt": b"caption %d" % n}))
        for n in range(ROWS)
    ]
    texts = [(f"{n:05d}", {"npy": embedding(n, sizes[n % len(sizes)])}) for n in range(ROWS) if n not in uncaptioned]
    write_shard(folder / "0.tar", images)
    write_shard(folder / "text" / "0.tar", texts)
    return Shard(str(folder / "0.tar"), ROWS)


def whole(sample: RawSample) -> RawSample:
    """With the embedding itself, where the cursor says only where it lies."""
    lies_on_disk = isinstance(sample.embedding, Span)
    return replace(sample, embedding=sample.embedding.read()) if lies_on_disk else sample


def expected(n: int, uncaptioned: set[int] = frozenset(), sizes: tuple[int, ...] = (5000,)) -> RawSample:
    name, image = f"0.tar:{n:05d}", b"image %d" % n
    if n in uncaptioned:
        return RawSample(name, image, problem="no embedding")
    return RawSample(name, image, embedding(n, sizes[n % len(sizes)]), b"caption %d" % n)


@given(
    st.sets(st.integers(0, ROWS - 1), min_size=1),
    st.sets(st.integers(0, ROWS - 1), max_size=3),
    st.lists(st.sampled_from([1, 4000, 5000, 9000]), min_size=1, max_size=3).map(tuple),
)
@settings(max_examples=60, deadline=None)
def test_any_rows_are_those_of_reading_all(tmp_path_factory, rows, uncaptioned, sizes):
    folder = tmp_path_factory.mktemp("cursor")
    shard = write(folder, uncaptioned, sizes)
    cursor = ShardCursor(shard, str(folder / "text"))
    assert [whole(cursor.read(row)) for row in sorted(rows)] == [
        expected(row, uncaptioned, sizes) for row in sorted(rows)
    ]
    assert cursor.row == max(rows) + 1
    cursor.close()


def test_rows_that_are_passed_over_are_not_read(tmp_path):
    """Images of 500 MB and embeddings of 400 MB that are holes in their files: to read them would take long."""
    for name, extension, size in (("0.tar", "jpg", 500 << 20), ("text/0.tar", "npy", 400 << 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            for n in range(50):
                info = tarfile.TarInfo(f"{n}.{extension}")
                info.size = size if n < 49 else 7
                file.write(info.tobuf())
                file.seek(info.size + -info.size % 512, 1)
            file.write(bytes(1024))
    found = ShardCursor(Shard(str(tmp_path / "0.tar"), 50), str(tmp_path / "text")).read(49)
    assert whole(found) == RawSample("0.tar:49", bytes(7), bytes(7))


def read_all(shard: Shard, text: object, unreadable: str = "skip") -> list[RawSample]:
    cursor = ShardCursor(shard, str(text), unreadable)
    return [whole(cursor.read(row)) for row in range(shard.count)]


def problems(found: list[RawSample]) -> list[str]:
    return [sample.problem for sample in found]


def test_a_shard_that_ends_early_gives_what_it_has(tmp_path, caplog):
    shard = write(tmp_path)
    data = Path(shard.location).read_bytes()
    Path(shard.location).write_bytes(data[: 4 * 1024 * 2 + 100])  # two members a sample, each with its header
    for unreadable in ("skip", "fail"):
        found = read_all(shard, tmp_path / "text", unreadable)
        readable = problems(found).count("")
        assert readable == scan_shard(shard.location).samples == 3
        assert found[:readable] == [expected(n) for n in range(readable)]
        assert set(problems(found)[readable:]) == {"shard ended early"}
    assert caplog.text.count("0.tar cannot be read any further: it ends without an end mark") == 2
    # A jump over the damage ends there too.
    assert ShardCursor(shard, str(tmp_path / "text")).read(20).problem == "shard ended early"


def test_a_member_that_comes_twice_is_no_image(tmp_path):
    shard = write(tmp_path)
    with tarfile.open(shard.location, "w") as tar:
        for name in ("00000.jpg", "00000.txt", "00000.jpg", "00001.jpg", "00002.txt", "00000.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = read_all(Shard(shard.location, 4), tmp_path / "text")
    # Twice in a sample; whole; no image; a key that comes back is a row of its own, here without an embedding.
    assert problems(found) == ["no image", "", CAPTION_ALONE, "no embedding"]


def samples_of(folder: Path, names: list[str], content: bytes = b"abc") -> list[RawSample]:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    count = scan_shard(folder / "0.tar").samples
    cursor = ShardCursor(Shard(str(folder / "0.tar"), count), "")
    return [cursor.read(row) for row in range(count)]


def test_why_a_picture_is_none_of_its_sample_is_said(tmp_path):
    dotted = samples_of(tmp_path, ["1.5.jpg", "1.5.txt", "1.6.jpg", "1.6.txt", "2.jpg", "2.txt"])
    assert [(s.name, s.problem) for s in dotted] == [("0.tar:1", "no image, dots in keys"), ("0.tar:2", "")]
    unsorted = samples_of(tmp_path, ["a.jpg", "b.jpg", "a.txt", "b.txt"])
    alone = "no image beside the caption, tar not sorted by name?"
    assert problems(unsorted) == ["", "", alone, alone]
    assert problems(samples_of(tmp_path, ["a.json", "b.jpg"])) == ["no image", ""]


@pytest.mark.parametrize("extension", ["JPG", "jpeg", "jpe", "jfif", "png", "webp", "gif"])
def test_the_bytes_say_what_an_image_is_and_not_the_name(tmp_path, extension):
    (found,) = samples_of(tmp_path, [f"a.{extension}", "a.txt"])
    assert (found.image, found.caption, found.problem) == (b"abc", b"abc", "")


def test_of_several_images_the_first_kind_is_taken(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.gif", "a.webp", "a.png", "a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(name.encode()))
    assert ShardCursor(Shard(str(tmp_path / "0.tar"), 1), "").read(0).image == b"a.jpg"


@pytest.mark.parametrize("what", ["gone", "other size", "forbidden", "folder"])
def test_an_unreadable_shard_is_skipped_or_fatal_as_is_said(tmp_path, what, caplog):
    shard = write(tmp_path)
    path = Path(shard.location)
    if what == "gone":
        path.unlink()
    elif what == "other size":
        shard = Shard(shard.location, ROWS, 123)
    elif what == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
    assert problems(read_all(shard, tmp_path / "text")) == ["shard unreadable"] * ROWS
    assert caplog.text.count("cannot be read any further") == 1
    with pytest.raises(ShardUnreadable, match=r"0\.tar cannot be read: .*data\.unreadable_shard=skip"):
        ShardCursor(shard, str(tmp_path / "text"), "fail")


def test_an_unreadable_sidecar_too(tmp_path):
    shard = write(tmp_path)
    (tmp_path / "text" / "0.tar").unlink()
    assert problems(read_all(shard, tmp_path / "text")) == ["embeddings unreadable"] * ROWS
    with pytest.raises(ShardUnreadable, match=r"text/0\.tar cannot be read"):
        ShardCursor(shard, str(tmp_path / "text"), "fail")


@pytest.fixture
def small_blocks(monkeypatch):
    for module, name, value in (
        (clients, "READ_TIMEOUT", 0.2), (clients, "CHUNK", 512), (retries, "FIRST_WAIT", 0.001),
        (locations, "FIRST_BLOCK", 4096), (locations, "LARGEST_BLOCK", 16384),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small_blocks")
def test_a_server_that_fails_at_random_changes_nothing_and_one_that_dies_costs_the_rest(tmp_path, http_server):
    write(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("0.tar", "text/0.tar")}
    chance = random.Random(0)
    server = http_server
    server.files.update(files)
    shard = Shard(f"{server.url}/0.tar", ROWS, len(files["0.tar"]))
    server.faults = [chance.choice(["", "", "cut", "short", "500", "refuse", "reset"]) for _ in range(100)]
    assert read_all(shard, f"{server.url}/text") == [expected(n) for n in range(ROWS)]
    assert len(server.faults) < 90, "some of them came"

    for unreadable in ("skip", "fail"):
        server.faults, server.for_good = [], False
        cursor = ShardCursor(shard, f"{server.url}/text", unreadable)
        assert cursor.read(0) == expected(0)
        server.faults, server.for_good = ["500"], True
        if unreadable == "fail":
            with pytest.raises(ShardUnreadable, match=r"8 tries in a row brought nothing.*status 500"):
                [cursor.read(row) for row in range(1, ROWS)]
            continue
        found = [cursor.read(row) for row in range(1, ROWS)]
        whole = problems(found).count("")
        assert found[:whole] == [expected(n) for n in range(1, whole + 1)] and whole < ROWS - 1
        assert set(problems(found)[whole:]) <= {"embeddings unreadable", "shard unreadable"}


@pytest.mark.usefixtures("small_blocks")
def test_to_resume_deep_in_a_remote_sidecar_takes_few_requests(tmp_path, http_server):
    write(tmp_path, sizes=(50_000,))
    files = {name: (tmp_path / name).read_bytes() for name in ("0.tar", "text/0.tar")}
    server = http_server
    server.files.update(files)
    cursor = ShardCursor(Shard(f"{server.url}/0.tar", ROWS), f"{server.url}/text")
    assert cursor.read(28) == expected(28, sizes=(50_000,))
    assert sum(path == "/text/0.tar" for path, _ in server.asked) <= 8, "one a row would be 28"


def test_embeddings_behind_urls_are_checked_and_read(tmp_path, s3_server):
    shard = write(tmp_path)
    meta = TextMeta("none", "0", "0", 4, 8, "float32", "float32", "none")
    meta.write(tmp_path / "text")
    with pytest.raises(ValueError, match="no text embeddings"):
        TextMeta.read(s3_server.where)
    s3_server.put("meta.json", (tmp_path / "text" / "meta.json").read_bytes())
    assert check_sidecars([shard], s3_server.where, 4, 8) == meta
    s3_server.put("index.json", b'{"shards": [{"shard": "1.tar", "samples": 1, "bytes": 1}]}')
    with pytest.raises(ValueError, match=r"1 of 1 shards have no embeddings .*first: 0\.tar"):
        check_sidecars([shard], s3_server.where, 4, 8)
    with pytest.raises(ValueError, match=r"empty\.npy', the embedding of the empty caption, cannot be used"):
        read_empty(s3_server.where, meta)
    assert stats_path(Path(shard.location)).exists()
