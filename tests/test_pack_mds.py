"""data.pack of shards of mosaicml-streaming: MDS, in its public format."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support.albums import captions, picture, put, run, samples, times

COLUMNS = {"caption": "str", "image": "jpeg", "score": "float64", "n": "int", "extra": "json", "blob": "pkl"}
SIZES = {"score": 8, "n": 8}


def mds(folder: Path, *shards: list[dict[str, bytes]]) -> Path:
    """Shards of samples whose columns are given as their bytes."""
    folder.mkdir(parents=True)
    entries = []
    for number, rows in enumerate(shards):
        name, described = f"shard.{number:05d}.mds", b'{"a description": 1}'
        data = [
            b"".join(struct.pack("<I", len(row[c])) for c in COLUMNS if c not in SIZES)
            + b"".join(row[c] for c in COLUMNS)
            for row in rows
        ]
        offsets = [4 + 4 * (len(rows) + 1) + len(described)]
        for sample in data:
            offsets.append(offsets[-1] + len(sample))
        head = struct.pack(f"<{len(rows) + 2}I", len(rows), *offsets)
        (folder / name).write_bytes(head + described + b"".join(data))
        entries.append({
            "format": "mds", "version": 2, "samples": len(rows), "zip_data": None, "raw_data": {"basename": name},
            "column_names": list(COLUMNS), "column_encodings": list(COLUMNS.values()),
            "column_sizes": [SIZES.get(name) for name in COLUMNS],
        })  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def row(i: int, **more: bytes) -> dict[str, bytes]:
    return {
        "caption": f"caption {i}".encode(), "image": picture("red", size=(40 + i, 30)),
        "score": struct.pack("<d", i / 8), "n": struct.pack("<q", -i), "extra": b'"text"',
        "blob": b"cos\nsystem\n", **more,
    }  # fmt: skip


def test_mds_shards_are_packed_with_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mds(tmp_path / "mds", [row(0), row(1, extra=b"{")], [row(2, caption=b""), row(3), row(4, image=b"")])
    out = tmp_path / "out"
    run(source, out, 2)
    assert captions(out) == ["caption 0", "caption 3"] and samples(out)[1][1]["jpg"] == picture("red", size=(43, 30))
    facts = json.loads(samples(out)[1][1]["json"])
    assert (facts["score"], facts["n"], facts["extra"]) == (0.375, -3, "text") and "blob" not in facts
    assert facts["url"] == "shard.00001.mds row 1"
    said = capsys.readouterr().out
    assert (
        "not taken into KEY.json: blob" in said
        and "1 skipped, damaged (" in said
        and "1 skipped, empty caption" in said
    )
    assert "1 skipped, no bytes of a picture: shard.00001.mds row 2" in said
    before = times(out)
    run(source, out, 2)
    assert times(out)["00000.tar"] == before["00000.tar"]


def test_what_is_no_whole_mds_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mds(tmp_path / "mds", [row(0), row(1)])
    shard, listed = source / "shard.00000.mds", (source / "index.json").read_text()

    def refused() -> str:
        with pytest.raises(SystemExit):
            run(source, tmp_path / "out")
        return capsys.readouterr().err.splitlines()[-1]

    data = shard.read_bytes()
    for damaged in (data[:-1], data[:10], b"\xff" * len(data)):
        shard.write_bytes(damaged)
        assert "is cut, or no MDS shard of 2 samples" in refused()
    shard.write_bytes(data)
    (source / "index.json").write_text(listed.replace('"jpeg"', '"pil"'))
    assert "pictures are taken from jpeg, png, bytes, captions from str; image is pil" in refused()
    (source / "index.json").write_text(listed.replace('"zip_data": null', '"zip_data": {"basename": "x"}'))
    shard.unlink()
    assert "is compressed: write the dataset again with compression=None" in refused()
    (source / "index.json").write_text(listed.replace("column_sizes", "sizes"))
    assert "is no index of MDS shards" in refused()


@pytest.mark.parametrize(
    "entry",
    [
        {"samples": -2}, {"samples": 10**12}, {"samples": 10**30}, {"samples": "2"}, {"samples": 1.5},
        {"column_sizes": [None, None, "8", "8", None, None]}, {"column_sizes": [None, None, -8, 8, None, None]},
        {"column_sizes": ["", None, 8, 8, None, None]},
        {"column_sizes": "no list"}, {"column_encodings": [["str"], "jpeg", "float64", "int", "json", "pkl"]},
        {"column_names": [1, 2, 3, 4, 5, 6]}, {"column_names": [None, "image", "score", "n", "extra", "blob"]},
        {"raw_data": {"basename": ["a"]}},
    ],
)  # fmt: skip
def test_an_index_with_values_of_other_kinds_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: dict
) -> None:
    source = mds(tmp_path / "mds", [row(0), row(1)])
    index = json.loads((source / "index.json").read_text())
    index["shards"][0] |= entry
    (source / "index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is no index of MDS shards (" in error or f"is cut, or no MDS shard of {entry.get('samples')} " in error
    assert not (tmp_path / "out").exists()


def test_a_deep_index_json_beside_pictures_is_none_of_mds(tmp_path: Path) -> None:
    put(tmp_path / "plain", "a.jpg", picture("red"), "one")
    (tmp_path / "plain/index.json").write_text("[" * 100_000)
    run(tmp_path / "plain", tmp_path / "out")
    assert captions(tmp_path / "out") == ["one"]


@pytest.mark.slow
def test_what_the_real_mds_writer_writes(tmp_path: Path) -> None:
    python = os.environ.get("STREAMING_PYTHON")
    if not python:
        pytest.skip("needs mosaicml-streaming in an environment of its own: name its Python in STREAMING_PYTHON")
    (tmp_path / "a.jpg").write_bytes(picture("red"))
    code = """import sys
from streaming import MDSWriter
image = open(sys.argv[1] + "/a.jpg", "rb").read()
columns = {"caption": "str", "image": "bytes", "score": "float32", "n": "int"}
with MDSWriter(out=sys.argv[1] + "/mds", columns=columns, size_limit=3000) as out:
    for i in range(9):
        out.write({"caption": f"caption {i}", "image": image, "score": i / 8, "n": i})"""
    subprocess.run([python, "-c", code, tmp_path], check=True, capture_output=True)
    run(tmp_path / "mds", tmp_path / "out")
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(9)]
    facts = [json.loads(members["json"]) for _, members in samples(tmp_path / "out")]
    assert [(fact["score"], fact["n"]) for fact in facts] == [(i / 8, i) for i in range(9)]
    assert all(members["jpg"] == picture("red") for _, members in samples(tmp_path / "out"))
