"""data.pack run again: what changed in the source is written again, and nothing else is touched."""

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest

from data.config import ImageRules
from data.index import Index, index
from data.prepare.packing import find_changes, write_changes
from data.prepare.rows import Row
from data.storage.shards import find_shards
from data.storage.tars import shard_digest, stats_path
from tests.support.albums import by_name, captions, contents, move, picture, put, replace_later, run, samples, times

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five pictures with captions of one length, and one without."""
    folder = tmp_path / "source"
    for name in "abcde":
        put(folder, f"{name}.jpg", picture("red"), f"old {name}")
    put(folder, "f.jpg", picture("red"))
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path, capsys: Capture) -> Path:
    """The pictures in shards of two."""
    run(source, tmp_path / "out", 2)
    capsys.readouterr()
    return tmp_path / "out"


def rerun(source: Path, out: Path, capsys: Capture) -> str:
    """Pack again into shards of two. Returns the first line that is printed."""
    run(source, out, 2)
    return capsys.readouterr().out.splitlines()[0]


def changed(before: dict[str, int], out: Path) -> set[str]:
    after = times(out)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - {
        "pack.json",
        "skipped.tsv",
    }


def test_nothing_changed(source: Path, out: Path, capsys: Capture) -> None:
    before = times(out)
    assert rerun(source, out, capsys).startswith("5 of 6 pictures packed in 3 shards")
    os.utime(source / "a.jpg")
    os.utime(source / "a.txt")
    assert rerun(source, out, capsys).startswith("5 of 6 pictures packed in 3 shards")
    assert not changed(before, out)


def test_a_caption_of_the_same_size_and_time(source: Path, out: Path, capsys: Capture) -> None:
    before = times(out)
    replace_later(source / "c.txt", b"new c")
    assert rerun(source, out, capsys) == "1 caption changed: shard 00001 written again"
    assert captions(out) == ["old a", "old b", "new c", "old d", "old e"]
    assert changed(before, out) == {"00001.tar", "00001_stats.json"}
    stats = json.loads(stats_path(out / "00001.tar").read_text())
    assert stats["digest"] == shard_digest(out / "00001.tar") == find_shards(out)[1].digest


def test_a_file_with_the_same_size_and_times_is_not_read(source: Path, out: Path, capsys: Capture) -> None:
    stats = json.loads(stats_path(out / "00000.tar").read_text())
    # A row whose entry lies about what was packed, but not about the files, stays as it is: they were not looked at.
    number, extension, files, _, caption, name = stats["rows"][1].split(" ", 5)
    stats["rows"][1] = " ".join((number, extension, files, "0" * 16, caption, name))
    stats_path(out / "00000.tar").write_text(json.dumps(stats))
    assert rerun(source, out, capsys).startswith("5 of 6")
    os.utime(source / "b.jpg")
    assert rerun(source, out, capsys) == "1 picture changed: shard 00000 written again"


def test_a_picture_is_changed_added_and_removed(source: Path, out: Path, capsys: Capture) -> None:
    keys = {name: key for name, (key, _) in by_name(out).items()}
    (source / "a.jpg").write_bytes(picture("blue"))
    (source / "c.jpg").unlink()
    put(source, "ba.png", picture("green", "PNG"), "added")
    line = "1 picture changed, 1 picture added, 1 picture removed: shards 00000, 00001 and 00002 written again"
    assert rerun(source, out, capsys) == line
    found = by_name(out)
    assert found["ba.png"] == ("000020001", "added") and "c.jpg" not in found
    assert samples(out)[0][1]["jpg"] == picture("blue")
    assert all(found[name][0] == keys[name] for name in ("a.jpg", "b.jpg", "d.jpg", "e.jpg"))
    before = times(out)
    put(source, "g.jpg", picture("red"), "g")
    assert rerun(source, out, capsys) == "1 picture added: shard 00001 written again"
    assert by_name(out)["g.jpg"][0] == "000010000"
    put(source, "h.jpg", picture("red"), "h")
    (source / "f.txt").write_text("at last")
    assert rerun(source, out, capsys) == "2 pictures added: shard 00003 new"
    assert not changed(before, out) & {"00000.tar", "00002.tar"}
    assert len(samples(out)) == sum(shard.count for shard in find_shards(out)) == 8


def test_a_shard_without_pictures_is_removed_and_its_place_filled(source: Path, out: Path, capsys: Capture) -> None:
    for name in "cd":
        (source / f"{name}.txt").unlink()
    assert rerun(source, out, capsys) == "2 pictures removed: shard 00001 removed"
    assert not (out / "00001.tar").exists() and captions(out) == ["old a", "old b", "old e"]
    (source / "d.txt").write_text("back")
    assert rerun(source, out, capsys) == "1 picture added: shard 00001 new"
    assert captions(out) == ["old a", "old b", "back", "old e"]


def test_missing_shards_are_written_as_they_were(source: Path, out: Path, capsys: Capture) -> None:
    whole, before = contents(out), times(out)
    (out / "00000.tar").unlink()
    # As if stopped between a new tar and its stats.
    stats_path(out / "00001.tar").unlink()
    line = "2 pictures added: shard 00000 written again, shard 00001 new"
    assert rerun(source, out, capsys) == line
    assert contents(out) == whole
    assert "00002.tar" not in changed(before, out)
    (out / "00000.tar").unlink()
    assert rerun(source, out, capsys) == "an interrupted packing is completed: shard 00000 written again"


def test_a_crash_while_a_shard_is_written_anew(source: Path, out: Path, capsys: Capture) -> None:
    rules = ImageRules()
    index(Index(str(out), workers=1))
    (source / "a.txt").write_text("newer a")
    put(source, "g.jpg", picture("red"), "g")

    def fail() -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def row(name: str, image: object = "") -> Row:
        return Row(name, image or str(source / name), caption_file=str(source / name.replace("jpg", "txt")))  # type: ignore[arg-type]

    rows = [row(f"{name}.jpg") for name in "abcdeg"]
    rows[1].image, rows[1].version = fail, "broken disk"
    with pytest.raises(OSError, match="Input/output error"):
        find_changes(rows, out, rules)
    changes = find_changes([row(f"{name}.jpg") for name in "abcdeg"], out, rules)
    changes.kept[0][1] = row("b.jpg", partial(fail))
    with pytest.raises(OSError, match="Input/output error"):
        write_changes(changes, out, 2, rules)
    assert not stats_path(out / "00000.tar").exists(), "an unfinished shard must not look finished"
    assert not (out / "index.json").exists(), "nor must the index give its old size"
    capsys.readouterr()
    line = "1 caption changed, 1 picture added: shards 00000 and 00002 written again"
    assert rerun(source, out, capsys) == line
    assert captions(out) == ["newer a", "old b", "old c", "old d", "old e", "g"]
    assert [key for key, _ in samples(out)] == [f"{shard:05d}{row:04d}" for shard in range(3) for row in range(2)]
    assert not [path.name for path in out.iterdir() if path.name.endswith((".part", ".old"))]


def test_a_leftover_of_a_shard_that_is_not_needed_any_more_is_removed(source: Path, out: Path, capsys: Capture) -> None:
    stats_path(out / "00002.tar").unlink()
    (source / "e.jpg").unlink()
    (out / "00000_stats.json.old").write_bytes((out / "00000_stats.json").read_bytes())
    rerun(source, out, capsys)
    assert not list(out.glob("*.old"))
    assert [shard.name for shard in find_shards(out)] == ["00000.tar", "00001.tar"]


def test_another_source_or_shard_size_is_refused(source: Path, out: Path, tmp_path: Path, capsys: Capture) -> None:
    def refused(folder: Path, size: int = 2) -> str:
        with pytest.raises(SystemExit):
            run(folder, out, size)
        return capsys.readouterr().err.splitlines()[-1]

    before = contents(out)
    assert "made with shard_size=2 (now 7): choose another out=, or delete that folder" in refused(source, 7)
    put(tmp_path / "other", "a.jpg", picture("red"), "another a")
    assert f"made with source={source} (now {tmp_path / 'other'}): choose another out=" in refused(tmp_path / "other")
    assert contents(out) == before
    # The same pictures elsewhere are the same source, and they may be changed there.
    moved = move(source, tmp_path / "moved")
    assert rerun(moved, out, capsys).startswith("5 of 6")
    (moved / "a.txt").write_text("newest a")
    assert rerun(moved, out, capsys) == "1 caption changed: shard 00000 written again"
    (out / "pack.json").unlink()
    assert "shards of another command (no pack.json)" in refused(moved)


def test_a_source_that_is_empty_now_deletes_nothing(source: Path, out: Path, capsys: Capture) -> None:
    before = contents(out)
    for path in source.glob("*.txt"):
        path.unlink()
    with pytest.raises(SystemExit):
        run(source, out, 2)
    assert "none of 6 pictures is usable" in capsys.readouterr().err
    assert contents(out) == before


def test_the_index_follows(source: Path, out: Path, capsys: Capture) -> None:
    index(Index(str(out), workers=1))
    before = (out / "index.json").read_bytes()
    assert len(samples(out)) == 5
    rerun(source, out, capsys)
    assert (out / "index.json").read_bytes() == before
    (source / "a.txt").write_text("a much longer caption " * 30)
    put(source, "g.jpg", picture("red"), "g")
    rerun(source, out, capsys)
    assert [shard.count for shard in find_shards(out)] == [2, 2, 2]
    assert (out / "index.json").exists() and captions(out)[0].startswith("a much longer")
    assert [shard.size for shard in find_shards(out)] == [(out / f"0000{i}.tar").stat().st_size for i in range(3)]


def test_shards_inside_the_source_are_no_pictures(source: Path, capsys: Capture) -> None:
    for _ in range(2):
        run(source, source / "shards", 2)
        said = capsys.readouterr().out
        assert said.startswith("5 of 6 pictures packed in 3 shards") and "not a picture" not in said


def test_rows_of_one_picture_are_matched_by_their_captions(tmp_path: Path, capsys: Capture) -> None:
    put(tmp_path, "a.jpg", picture("red"))
    table, out = tmp_path / "t.csv", tmp_path / "out"

    def pack(*texts: str) -> str:
        table.write_text("path,text\n" + "".join(f"a.jpg,{text}\n" for text in texts))
        return rerun(table, out, capsys)

    pack("one", "two", "three")
    assert pack("zero", "one", "two", "three") == "1 picture added: shard 00001 written again"
    assert pack("zero", "two", "three") == "1 picture removed: shard 00000 written again"
    assert pack("zero", "two", "four") == "1 caption changed: shard 00001 written again"
    assert sorted(captions(out)) == ["four", "two", "zero"]
