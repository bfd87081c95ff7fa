"""data.pack of datasets as Hugging Face has them: folders of .parquet, what save_to_disk wrote; further columns."""

import datetime
import errno
import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import ImageRules
from data.prepare.arrow_tables import list_parquet
from data.prepare.columns import Columns
from data.prepare.packing import find_changes, write_changes
from tests.support.albums import captions, contents, picture, put, run, samples, times

Capture = pytest.CaptureFixture[str]
COLOURS = ("red", "green", "blue", "yellow")


def rows(first: int, n: int, **more: object) -> dict[str, list]:
    """A column of {bytes, path} without paths, as most datasets have it, captions and a score."""
    numbers = range(first, first + n)
    images = [{"bytes": picture(COLOURS[i % 4], size=(40 + i, 30)), "path": None} for i in numbers]
    return {"image": images, "text": [f"caption {i}" for i in numbers], "score": [i / 8 for i in numbers], **more}  # type: ignore[dict-item]


def parquet(path: Path, table: dict[str, list], group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def saved(folder: Path, *tables: dict[str, list], batch: int = 3, first: int = 0) -> Path:
    """A dataset in the form of save_to_disk: streams of batches, and a state.json that names them.

    first: how many files there are before these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{first + i:05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        made = pa.table(table)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, made.schema) as stream:
            stream.write_table(made, max_chunksize=batch)
    listed = [{"filename": path.name} for path in sorted(folder.glob("*.arrow"))]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def facts(out: Path) -> list[dict]:
    return [json.loads(members["json"]) for _, members in samples(out)]


def refused(source: Path, out: Path, capsys: Capture, **more: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(source, out, **more)  # type: ignore[arg-type]
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_parquet_is_one_dataset_and_a_pattern_takes_some(tmp_path: Path, capsys: Capture) -> None:
    hub, out = tmp_path / "hub", tmp_path / "out"
    for i in range(3):
        parquet(hub / f"data/train-{i}.parquet", rows(4 * i, 4))
    parquet(hub / "data/test-0.parquet", rows(50, 2))
    (hub / "README.md").write_text("of the hub")
    run(hub, out, 5)
    assert captions(out) == [f"caption {i}" for i in (50, 51, *range(12))]
    assert [fact["score"] for fact in facts(out)] == [i / 8 for i in (50, 51, *range(12))]
    assert facts(out)[2]["url"] == "data/train-0.parquet row 0"
    assert samples(out)[3][1]["jpg"] == picture("green", size=(41, 30))
    said = capsys.readouterr().out
    assert f"4 .parquet files: {hub}/data/test-0.parquet to {hub}/data/train-2.parquet" in said
    before = times(out)
    # A file that was written anew with one other caption: the shards of its other rows stay.
    parquet(hub / "data/train-2.parquet", rows(8, 4, text=["caption 8", "other", "caption 10", "caption 11"]))
    run(hub, out, 5)
    assert "1 caption changed: shard 00002 written again" in capsys.readouterr().out
    assert {name for name in before if times(out)[name] != before[name]} == {
        "00002.tar",
        "00002_stats.json",
        "pack.json",
    }
    run(hub / "data/train-*.parquet", tmp_path / "train")
    assert len(captions(tmp_path / "train")) == 12
    assert "neither a folder nor" in refused(hub / "data/valid-*.parquet", tmp_path / "none", capsys)


def test_another_file_leaves_the_rows_of_the_first(tmp_path: Path, capsys: Capture) -> None:
    def grow(source: Path, out: Path) -> None:
        run(source, out, 4)
        before = times(out)
        capsys.readouterr()
        parquet(tmp_path / "hub/b.parquet", rows(4, 4))
        if source.name == "saved":
            saved(source, rows(4, 4), first=1)
        run(source, out, 4)
        assert "4 pictures added: shard 00001 new" in capsys.readouterr().out
        assert times(out)["00000.tar"] == before["00000.tar"]

    parquet(tmp_path / "hub/a.parquet", rows(0, 4))
    grow(tmp_path / "hub", tmp_path / "folder")
    (tmp_path / "hub/b.parquet").unlink()
    grow(tmp_path / "hub/*.parquet", tmp_path / "pattern")
    grow(saved(tmp_path / "saved", rows(0, 4)), tmp_path / "arrow")
    run(tmp_path / "hub/a.parquet", tmp_path / "one")
    assert [fact["url"] for fact in facts(tmp_path / "one")] == [f"row {i}" for i in range(4)]


def test_pictures_and_shards_are_not_taken_for_a_folder_of_parquet(tmp_path: Path, capsys: Capture) -> None:
    put(tmp_path / "mixed", "a.jpg", picture("red"), "by its file")
    parquet(tmp_path / "mixed/t.parquet", rows(0, 2))
    run(tmp_path / "mixed", tmp_path / "out")
    assert captions(tmp_path / "out") == ["by its file"]
    parquet(tmp_path / "downloaded/00000.parquet", rows(0, 2))
    (tmp_path / "downloaded/00000.tar").write_bytes(b"")
    assert "holds shards already" in refused(tmp_path / "downloaded", tmp_path / "other", capsys)
    parquet(tmp_path / "cut/a.parquet", rows(0, 2))
    (tmp_path / "cut/b.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    assert "b.parquet' is not a readable parquet file" in refused(tmp_path / "cut", tmp_path / "other", capsys)


def test_what_save_to_disk_wrote(tmp_path: Path, capsys: Capture) -> None:
    source, out = saved(tmp_path / "saved", rows(0, 7), rows(7, 5)), tmp_path / "out"
    run(source, out, 5)
    assert captions(out) == [f"caption {i}" for i in range(12)]
    assert [fact["score"] for fact in facts(out)] == [i / 8 for i in range(12)]
    assert samples(out)[7][1]["jpg"] == picture("yellow", size=(47, 30))
    assert facts(out)[8]["url"] == "data-00001.arrow row 1"
    before = times(out)
    run(source, out, 5)
    assert all(times(out)[name] == before[name] for name in before if name.endswith(".tar"))
    (tmp_path / "split").mkdir()
    (tmp_path / "split/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "holds splits (train, test): give one, source=" in refused(tmp_path / "split", tmp_path / "none", capsys)
    state = json.loads((source / "state.json").read_text())
    (source / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "save it again after flatten_indices()" in refused(source, tmp_path / "none", capsys)
    for damaged in ("[1]", "[" * 100_000):
        (source / "state.json").write_text(damaged)
        assert "is none of Hugging Face's datasets" in refused(source, tmp_path / "none", capsys)
    (source / "dataset_dict.json").write_text("[" * 100_000)
    assert "holds splits (none that can be read)" in refused(source, tmp_path / "none", capsys)


def test_damage_in_what_save_to_disk_wrote_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    file = saved(tmp_path / "saved", rows(0, 9)) / "data-00000.arrow"
    data = file.read_bytes()
    where_captions_end = struct.pack("<4i", 0, 9, 18, 27)
    assert data.count(where_captions_end) == 3
    for damaged in (
        data.replace(where_captions_end, struct.pack("<4i", 0, 9, 18, 2**31 - 1), 1),
        data[: len(data) // 2],
    ):
        # Not written over: the file is mapped.
        file.unlink()
        file.write_bytes(damaged)
        assert "is not a readable arrow file" in refused(file.parent, tmp_path / "none", capsys)


def test_further_columns_go_into_key_json(tmp_path: Path, capsys: Capture) -> None:
    day = datetime.date(2026, 1, 2)
    more = {
        "URL": ["https://h/0", None], "similarity": pa.array([0.31, float("nan")], pa.float32()), "n": [None, 3],
        "safe": [True, False], "day": [day, None], "width": [1, 1], "tags": [["a"], []], "thumb": [b"x", b"y"],
    }  # fmt: skip
    source = parquet(tmp_path / "t.parquet", rows(0, 2) | more)  # type: ignore[arg-type]
    run(source, tmp_path / "all")
    first, second = facts(tmp_path / "all")
    assert first["url"] == "https://h/0" and "URL" not in first and abs(first["similarity"] - 0.31) < 1e-6
    assert (first["n"], first["safe"], first["day"], first["width"]) == (None, True, "2026-01-02", 40)
    assert (second["url"], second["similarity"], second["n"], second["day"]) == (None, None, 3, None)
    assert not {"tags", "thumb", "text", "image"} & set(first)
    assert "not taken into KEY.json: width, tags, thumb" in capsys.readouterr().out
    run(source, tmp_path / "some", columns="[Similarity,n]")
    assert set(facts(tmp_path / "some")[0]) == {"url", "similarity", "n", "caption", "key", "status", "width", "height"}
    assert "no column 'similarty' (did you mean 'similarity'?)" in refused(
        source, tmp_path / "none", capsys, columns="similarty"
    )
    assert "KEY.json has a width of data.pack's own" in refused(source, tmp_path / "none", capsys, columns="width")
    parquet(source, rows(0, 2) | more | {"similarity": [0.4, 0.2]})
    capsys.readouterr()
    run(source, tmp_path / "some", columns="[similarity,n]")
    assert "2 pictures with changed columns: shard 00000 written again" in capsys.readouterr().out
    assert [fact["similarity"] for fact in facts(tmp_path / "some")] == [0.4, 0.2]


def bad_texts(*values: bytes) -> pa.Array:
    """A column of texts with these bytes, UTF-8 or not."""
    return pa.array(list(values), pa.binary()).view(pa.string())


def odd() -> dict[str, pa.Array]:
    """Columns of two rows whose first value Python cannot hold."""
    return {
        "note": bad_texts(b"fr\xfch", b"fine"),
        "when": pa.array([1, 0], pa.timestamp("ns")),
        "took": pa.array([1, 0], pa.duration("ns")),
        "day": pa.array([10**8, 1], pa.int32()).cast(pa.date32()),
        "far": pa.array([10**14, 0], pa.timestamp("s")),
        "zone": pa.array([1, None], pa.timestamp("s", "Mars/Phobos")),
    }


@pytest.mark.parametrize("form", [parquet, saved])
def test_a_value_that_cannot_be_read_is_its_own_fault_alone(
    tmp_path: Path, capsys: Capture, form: Callable[[Path, dict], Path]
) -> None:
    texts = bad_texts(b"caf\xe9", b"caption 1", b"caption 2")
    paths = pa.StructArray.from_arrays(
        [pa.array([picture("red")] * 3, pa.binary()), bad_texts(b"a.jpg", b"b.jpg", b"\xff.jpg")], ["bytes", "path"]
    )
    run(form(tmp_path / "texts.parquet", {"image": paths, "text": texts}), tmp_path / "texts")
    assert captions(tmp_path / "texts") == ["caption 1"]
    said = capsys.readouterr().out
    assert "1 skipped, caption is not UTF-8: a.jpg" in said and "1 skipped, path is not UTF-8: " in said
    run(form(tmp_path / "odd.parquet", rows(0, 2) | odd()), tmp_path / "odd")
    first, second = facts(tmp_path / "odd")
    assert all(first[name] is None for name in odd())
    assert (second["note"], second["day"], second["zone"]) == ("fine", "1970-01-02", None)
    assert (second["when"], second["far"]) == ("1970-01-01T00:00:00",) * 2
    assert "not taken into KEY.json: note, when, took, day, far, zone" in capsys.readouterr().out


def test_names_of_columns(tmp_path: Path, capsys: Capture) -> None:
    table = pa.table(rows(0, 2)).append_column("score", pa.array([1, 2]))
    pq.write_table(table, tmp_path / "two.parquet")
    assert "has 2 columns 'score': rename them, or name" in refused(tmp_path / "two.parquet", tmp_path / "none", capsys)
    pq.write_table(table.append_column("n", pa.array([1, 2])), tmp_path / "two.parquet")
    run(tmp_path / "two.parquet", tmp_path / "chosen", columns="n")
    assert [fact["n"] for fact in facts(tmp_path / "chosen")] == [1, 2]
    put(tmp_path, "a.jpg", picture("red"))
    (tmp_path / "t.csv").write_bytes(b"path,text,,gr\xf6\xdfe\na.jpg,one,0,5\n")
    run(tmp_path / "t.csv", tmp_path / "csv")
    assert facts(tmp_path / "csv")[0]["gr??e"] == 5 and "" not in facts(tmp_path / "csv")[0]
    assert "not taken into KEY.json: a column without a name" in capsys.readouterr().out
    (tmp_path / "t.jsonl").write_text('{"path": "a.jpg", "text": "one", "a\\ud800": 1}')
    run(tmp_path / "t.jsonl", tmp_path / "jsonl")
    assert facts(tmp_path / "jsonl")[0]["a?"] == 1


def test_a_group_of_values_is_a_picture_only_if_its_bytes_are_bytes(tmp_path: Path, capsys: Capture) -> None:
    for i, wrong in enumerate(("text", ["list"])):
        table = {"image": [{"bytes": wrong, "path": "a.jpg"}], "path": ["a.jpg"], "text": ["one"]}
        put(tmp_path, "a.jpg", picture("red"))
        run(parquet(tmp_path / f"{i}.parquet", table), tmp_path / f"{i}", image_column="path")
        assert captions(tmp_path / f"{i}") == ["one"]
        assert "none of 1 picture is usable" in refused(
            tmp_path / f"{i}.parquet", tmp_path / "none", capsys, image_column="image"
        )


def test_further_columns_of_texts(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", picture("red"))
    (tmp_path / "t.csv").write_text(
        "path,text,score,zip,note\na.jpg,one,0.5,01234,x\na.jpg,two,,9,\na.jpg,three,-2e3,1,1\n"
    )
    run(tmp_path / "t.csv", tmp_path / "csv")
    assert [(f["score"], f["zip"], f["note"]) for f in facts(tmp_path / "csv")] == [
        (0.5, "01234", "x"), (None, "9", ""), (-2000.0, "1", "1"),
    ]  # fmt: skip
    (tmp_path / "long.csv").write_text(f"path,text,n\na.jpg,one,{'9' * 5000}\n")
    run(tmp_path / "long.csv", tmp_path / "long")
    assert facts(tmp_path / "long")[0]["n"] == "9" * 5000, "more digits than Python reads as a number"
    (tmp_path / "blank.csv").write_text("path,text,n\na.jpg,one,\xa05\na.jpg,two,7 \n")
    run(tmp_path / "blank.csv", tmp_path / "blank")
    assert [fact["n"] for fact in facts(tmp_path / "blank")] == [5, 7]
    lines = [{"path": "a.jpg", "text": "one", "score": 0.5, "deep": {"a": 1}}, {"path": "a.jpg", "text": "two"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(tmp_path / "t.jsonl", tmp_path / "jsonl")
    assert [f.get("score") for f in facts(tmp_path / "jsonl")] == [0.5, None]
    assert not any("deep" in f for f in facts(tmp_path / "jsonl"))


def test_threads_write_what_one_writes_and_take_webp_by_choice(tmp_path: Path) -> None:
    table = rows(0, 40)
    for i in (3, 17):
        table["image"][i]["bytes"] = b"no picture"
    table["image"][5]["bytes"] = picture("red", "WEBP")
    source = parquet(tmp_path / "t.parquet", table, group=2)
    for workers in (1, 8):
        run(source, tmp_path / f"{workers}", 7, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "8") and len(captions(tmp_path / "1")) == 37
    run(source, tmp_path / "8", 7, allow_webp="true")
    assert len(captions(tmp_path / "8")) == 38


def test_two_groups_of_pictures_are_in_memory_and_no_file_stays_open(tmp_path: Path) -> None:
    size = 200_000
    for i in range(5):
        bits = [picture("red") + os.urandom(size) for _ in range(6)]
        images = {"image": [{"bytes": data, "path": None} for data in bits], "plain": bits}
        parquet(tmp_path / f"hub/{i}.parquet", images | {"text": ["one"] * 6}, group=2)
    files, before = sorted((tmp_path / "hub").glob("*")), pa.total_allocated_bytes()
    for image in ("image", "plain"):
        found = list_parquet(files, tmp_path, ImageRules(), Columns(image, "text"))
        held = []
        for row in found:
            assert callable(row.image) and len(row.image()) > size
            held.append((pa.total_allocated_bytes() - before) / size)
        assert len(found) == 30 and 3.9 < max(held) < 4.5, "two groups of two pictures"
        opened = [os.path.realpath(number) for number in Path("/proc/self/fd").glob("*")]
        assert not [name for name in opened if name.endswith(".parquet")]


def test_a_file_that_is_gone_costs_its_rows(tmp_path: Path) -> None:
    files = [parquet(tmp_path / f"{i}.parquet", rows(0, 2)) for i in range(2)]
    found = list_parquet(files, tmp_path, ImageRules(), Columns())
    changes = find_changes(found, tmp_path / "out", ImageRules())
    files[0].unlink()
    write_changes(changes, tmp_path / "out", 10, ImageRules())
    assert [fact["url"] for fact in facts(tmp_path / "out")] == ["1.parquet row 0", "1.parquet row 1"]
    assert "can't be read (No such file" in (tmp_path / "out/skipped.tsv").read_text()


def test_a_failing_disk_is_no_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "t.parquet", rows(0, 6))
    found = list_parquet([source], tmp_path, ImageRules(), Columns())

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("data.prepare.arrow_tables._Parquet.read", fail)
    changes = find_changes(found, tmp_path / "out", ImageRules())
    with pytest.raises(OSError, match="Input/output error"):
        write_changes(changes, tmp_path / "out", 10, ImageRules(), workers=4)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.slow
def test_what_the_real_datasets_writes(tmp_path: Path) -> None:
    python = os.environ.get("DATASETS_PYTHON")
    if not python:
        pytest.skip("needs Hugging Face's datasets in an environment of its own: name its Python in DATASETS_PYTHON")
    table = rows(0, 9, label=["a", "b", "a"] * 3)
    parquet(tmp_path / "t.parquet", table)
    code = """import sys, datasets
d = datasets.Dataset.from_parquet(sys.argv[1], cache_dir=sys.argv[2]).cast_column("image", datasets.Image())
d = d.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
d.save_to_disk(sys.argv[2] + "/two", num_shards=2)
d.select([8, 0, 4]).save_to_disk(sys.argv[2] + "/chosen")
d.to_parquet(sys.argv[2] + "/one.parquet")
datasets.DatasetDict({"train": d}).save_to_disk(sys.argv[2] + "/split")"""
    subprocess.run([python, "-c", code, tmp_path / "t.parquet", tmp_path], check=True, capture_output=True)
    everything = [(members["txt"], zlib.crc32(members["jpg"])) for members in _packed(tmp_path, "t.parquet")]
    for name in ("two", "one.parquet", "split/train"):
        found = _packed(tmp_path, name)
        assert [(members["txt"], zlib.crc32(members["jpg"])) for members in found] == everything
        assert [json.loads(members["json"])["label"] for members in found] == [0, 1, 0] * 3
    assert [members["txt"] for members in _packed(tmp_path, "chosen")] == [b"caption 8", b"caption 0", b"caption 4"]


def _packed(folder: Path, name: str) -> list[dict[str, bytes]]:
    out = folder / "packed" / name
    run(folder / name, out)
    return [members for _, members in samples(out)]
