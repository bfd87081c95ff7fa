"""Which shards a dataset has: folders, braces, lists, URLs; the index of their counts, and when it is too old."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data.index import Index, index
from data.storage import clients, retries
from data.storage.digests import caption_digest
from data.storage.shards import Shard, find_shards
from data.storage.tars import read_shard, shard_digest, stats_path, write_shard

pytest_plugins = ["tests.support.faulty_server"]


def write(folder: Path, counts: dict[str, int], stats: bool = True) -> None:
    for name, count in counts.items():
        write_shard(folder / name, [(f"{n:05d}", {"jpg": b"x" * n, "txt": b"y"}) for n in range(count)])
        if not stats:
            stats_path(folder / name).unlink()


def seen(where: object) -> list[tuple[str, int]]:
    return [(shard.name, shard.count) for shard in find_shards(where)]


COUNTS = {"00000.tar": 5, "00001.tar": 7, "00002.tar": 1}


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "shards", COUNTS)
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stats", [True, False])
def test_an_index_is_made_from_stats_or_headers_and_read_instead_of_them(tmp_path, stats, workers, capfd):
    write(tmp_path, COUNTS, stats)
    index(Index(str(tmp_path), workers=workers))
    assert "3 shards, 13 samples" in capfd.readouterr().out
    entries = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [(entry["shard"], entry["samples"]) for entry in entries] == list(COUNTS.items())
    assert all(entry["bytes"] == (tmp_path / entry["shard"]).stat().st_size for entry in entries)
    for path in tmp_path.glob("*_stats.json"):
        path.write_text("not read any more")
    found = find_shards(tmp_path)
    assert [(shard.name, shard.count) for shard in found] == list(COUNTS.items())
    first = tmp_path / "00000.tar"
    assert found[0] == Shard(str(first), 5, first.stat().st_size, shard_digest(first))
    assert not list(tmp_path.glob("*.part"))


def test_a_digest_changes_with_keys_captions_and_their_order_and_with_nothing_else(tmp_path):
    """It is the same from the stats file, the index and the tar itself, whatever the pictures are."""
    rows = [("a", {"jpg": b"1", "txt": b"one"}), ("caf\udce9", {"txt": "zwei ü".encode()}), ("c", {"jpg": b"3"})]
    joined = b"".join(bytes.fromhex(caption_digest(key, members.get("txt", b""))) for key, members in rows)
    expected = hashlib.blake2b(joined, digest_size=16).hexdigest()
    assert caption_digest("caf\udce9", b"x") == hashlib.blake2b(b"caf\xe9\0x", digest_size=8).hexdigest()
    write_shard(tmp_path / "0.tar", rows)
    assert read_shard_keys(tmp_path / "0.tar") == ["a", "caf\udce9", "c"]
    assert find_shards(tmp_path)[0].digest == shard_digest(tmp_path / "0.tar") == expected
    stats_path(tmp_path / "0.tar").unlink()
    assert find_shards(tmp_path)[0].digest == expected
    index(Index(str(tmp_path), workers=1))
    assert find_shards(tmp_path)[0].digest == expected
    changed = [rows[::-1], rows[:2], [("b", rows[0][1]), *rows[1:]], [("a", {"txt": b"One"}), *rows[1:]]]
    for number, other in enumerate([[("a", {"txt": b"one"}), *rows[1:]], *changed]):
        write_shard(tmp_path / "other.tar", other)
        assert (shard_digest(tmp_path / "other.tar") == expected) == (number == 0)


def read_shard_keys(path: Path) -> list[str]:
    return [key for key, _ in read_shard(path, set())]


def test_the_digest_in_a_stats_file_that_is_older_than_its_tar_is_not_believed(folder):
    """As when another program wrote the tar anew."""
    shard = folder / "00001.tar"
    before = find_shards(folder)[1]
    with tarfile.open(shard, "w") as tar:
        for n in range(7):
            info = tarfile.TarInfo(f"{n:05d}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"z"))
    os.utime(stats_path(shard), ns=(shard.stat().st_mtime_ns - 1,) * 2)
    assert find_shards(folder)[1].digest is None
    index(Index(str(folder)))
    assert find_shards(folder)[1].digest == shard_digest(shard) != before.digest


def test_only_headers_are_read(tmp_path):
    """Data that is not there, a hole of 60 GB, would take minutes to read."""
    with open(tmp_path / "0.tar", "wb") as file:
        for n in range(100):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size = 600 << 20
            file.write(info.tobuf())
            file.seek(info.size, 1)
        file.write(bytes(1024))
    index(Index(str(tmp_path), workers=1))
    assert seen(tmp_path) == [("0.tar", 100)]


def test_an_index_that_does_not_fit_the_folder_is_refused(folder):
    index(Index(str(folder)))
    write(folder, {"00003.tar": 2})
    with pytest.raises(ValueError, match=r"out of date: 1 shards are not in it and 0 .*00003.tar.*data\.index shards="):
        find_shards(folder)
    (folder / "00003.tar").unlink()
    (folder / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"0 shards are not in it and 1 of its shards are gone \(such as 00001.tar\)"):
        find_shards(folder)
    index(Index(str(folder)))
    assert seen(folder) == [("00000.tar", 5), ("00002.tar", 1)]
    for wrong in ("{", "[]", '{"shards": [{"shard": "0.tar"}]}', '{"shards": 3}'):
        (folder / "index.json").write_text(wrong)
        with pytest.raises(ValueError, match="is no index of shards"):
            find_shards(folder)


def test_stats_that_lie_are_found_out_by_a_check(folder, capfd):
    stats = stats_path(folder / "00001.tar")
    stats.write_text(json.dumps({"successes": 9, "digest": "0" * 32}))
    index(Index(str(folder)))
    assert seen(folder)[1] == ("00001.tar", 9)
    capfd.readouterr()
    index(Index(str(folder), check=True))
    said = capfd.readouterr().out
    assert "1 shard with another number" in said and "00001.tar: 9 by its stats, 7 in the tar" in said
    assert seen(folder)[1] == ("00001.tar", 7)
    stats.write_text("{}")
    with pytest.raises(ValueError, match="no index: repair or remove"):
        index(Index(str(folder), workers=1))
    assert 'no readable "successes"' in capfd.readouterr().out


def test_damaged_shards_count_as_far_as_they_can_be_read(tmp_path, capfd, caplog):
    write(tmp_path, COUNTS, stats=False)
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[:6000])
    (tmp_path / "00002.tar").write_text("this is no tar")
    expected = [("00000.tar", 5), ("00001.tar", 2), ("00002.tar", 0)]
    assert seen(tmp_path) == expected
    assert "00001.tar: only its first 2 samples can be read: it ends without an end mark" in caplog.text
    index(Index(str(tmp_path)))
    said = capfd.readouterr().out
    assert "2 shards with damage" in said and "00001.tar: it ends without" in said and "00002.tar" in said
    assert seen(tmp_path) == expected


def test_braces_and_lists_name_the_shards_in_their_order(folder, tmp_path):
    assert seen(f"{folder}/{{00002,00000}}.tar") == [("00002.tar", 1), ("00000.tar", 5)]
    assert seen(f"{folder}/{{00000..00001}}.tar") == [("00000.tar", 5), ("00001.tar", 7)]
    assert seen(f"{folder}/00001.tar") == [("00001.tar", 7)]
    write(tmp_path / "more", {"9.tar": 3})
    (tmp_path / "some.txt").write_text(f"# ours\nmore/9.tar\n\n{folder}/00002.tar\n")
    assert seen(tmp_path / "some.txt") == [("9.tar", 3), ("00002.tar", 1)]
    index(Index(str(tmp_path / "some.txt"), out=str(tmp_path / "some.json")))
    assert find_shards(tmp_path / "some.json")[0] == Shard(
        str(tmp_path / "more" / "9.tar"), 3, 10240, shard_digest(tmp_path / "more" / "9.tar")
    )
    index(Index(str(folder)))
    stats_path(folder / "00002.tar").write_text("the index is read")
    assert seen(f"{folder}/{{00002,00000}}.tar") == [("00002.tar", 1), ("00000.tar", 5)]


def test_wrong_datasets_are_refused_with_a_remedy(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*nowhere"):
        find_shards(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        find_shards(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="is not read; use a path"):
        find_shards("ftp://some/where")
    write(tmp_path / "more", {"00001.tar": 3})
    (tmp_path / "twice.txt").write_text("more/00001.tar\nshards/00001.tar\n")
    with pytest.raises(ValueError, match=r"2 shards of .*twice.txt' are called 00001.tar"):
        find_shards(tmp_path / "twice.txt")
    with pytest.raises(ValueError, match="hold no samples"):
        write(tmp_path / "none", {"0.tar": 0})
        find_shards(tmp_path / "none")
    with pytest.raises(ValueError, match=r"out=FILE\.json"):
        index(Index(f"{folder}/{{00000..00001}}.tar"))
    with pytest.raises(ValueError, match="workers=0"):
        index(Index(str(folder), workers=0))
    with pytest.raises(ValueError, match="is an index"):
        index(Index(f"{folder}/index.json"))


def test_shards_behind_a_server_need_an_index_which_the_command_makes(
    folder, tmp_path, http_server, monkeypatch, capfd
):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    stats_path(folder / "00001.tar").unlink()  # one is counted by its headers
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server = http_server
    server.files.update(files)
    braces, out = f"{server.url}/{{00000..00002}}.tar", tmp_path / "remote.json"
    with pytest.raises(ValueError, match=r"has no index.json.*data\.index shards='.*' out=FILE\.json`, then give"):
        find_shards(braces)
    with pytest.raises(ValueError, match=r"data\.index shards='.*/\{00000\.\.00099\}\.tar' out=FILE\.json"):
        find_shards(server.url)
    with pytest.raises(ValueError, match="cannot be listed over HTTP"):
        index(Index(server.url))
    server.faults = ["500", "cut", "refuse"]
    index(Index(braces, out=str(out), workers=2))
    assert seen(out) == list(COUNTS.items())
    assert find_shards(out)[1] == Shard(
        f"{server.url}/00001.tar", 7, len(files["00001.tar"]), shard_digest(folder / "00001.tar")
    )
    # Laid beside the shards, it serves for the folder and for braces.
    server.files["index.json"] = out.read_bytes()
    assert seen(server.url + "/") == seen(braces) == list(COUNTS.items())
    del server.files["00002.tar"]
    with pytest.raises(ValueError, match="could be counted"):
        index(Index(braces, out=str(out), workers=1))
    assert "00002.tar is not there (status 404)" in capfd.readouterr().out


def test_an_s3_folder_is_listed_indexed_and_read(folder, s3_server, capfd):
    for path in folder.iterdir():
        s3_server.put(path.name, path.read_bytes())
    with pytest.raises(ValueError, match=r"has no index.json.*run `python -m data\.index shards='s3://[-a-z0-9/]*'`$"):
        find_shards(s3_server.where)
    index(Index(s3_server.where, workers=2))
    assert seen(s3_server.where) == list(COUNTS.items())
    assert find_shards(s3_server.where)[0].location == f"{s3_server.where}/00000.tar"
    assert len(clients.list_s3(s3_server.where)) == 7


def test_a_large_index_is_read_in_no_time(tmp_path):
    """120,000 shards: no file of them is looked at, nor are there any."""
    entries = [{"shard": f"{n:06d}.tar", "samples": 1000, "bytes": 1 << 20} for n in range(120_000)]
    (tmp_path / "all.json").write_text(json.dumps({"shards": entries}))
    found = find_shards(tmp_path / "all.json")
    assert len(found) == 120_000 and sum(shard.count for shard in found) == 120_000_000


def test_members_of_one_sample_that_lie_apart_are_samples_of_their_own(tmp_path):
    """The count is that of the rows which the reader gives."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt", "__meta__/c.jpg", "folder/.hidden", "README"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert seen(tmp_path) == [("0.tar", 4)]
