"""data.pack of tables: CSV, JSON lines and parquet; a bad row is skipped and named, and never stops the rest."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.pack import Pack, pack
from tests.support.albums import by_name, captions, picture, put, run, samples, times

Capture = pytest.CaptureFixture[str]


def _pack(source: Path, out: Path) -> None:
    pack(Pack(str(source), str(out)))


def rows_of(table: Path) -> list[dict[str, str | None]]:
    """Good by a relative, an absolute and a file:// path, and bad in four ways."""
    put(table.parent, "images/a.jpg", picture("red"))
    return [
        {"URL": "images/a.jpg", "TEXT": "relative, with a comma"},
        {"URL": str(table.parent / "images/a.jpg"), "TEXT": "absolute"},
        {"URL": f"file://{table.parent / 'images/a.jpg'}", "TEXT": "file"},
        {"URL": "https://example.com/a.jpg", "TEXT": "far away"},
        {"URL": "images/none.jpg", "TEXT": "missing"},
        {"URL": "images/a.jpg", "TEXT": None},
        {"URL": None, "TEXT": "no path"},
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_paths_and_captions(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / f"table{suffix}"
    rows = rows_of(table)
    if suffix == ".csv":
        with open(table, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["URL", "TEXT"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    run(table, tmp_path / "out")
    assert captions(tmp_path / "out") == ["relative, with a comma", "absolute", "file"]
    said = capsys.readouterr().out
    for reason in (
        "a web address (download it first",
        "can't be read (No such file",
        "empty caption",
        "no path: row 6",
    ):
        assert f"1 skipped, {reason}" in said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures for a table."""
    for name, colour in (("a", "red"), ("b", "blue")):
        put(tmp_path, f"{name}.jpg", picture(colour))
    return tmp_path


def pack_text(
    folder: Path, text: str | bytes, capsys: Capture, name: str = "t.csv", **more: object
) -> tuple[list[str], str]:
    """Pack a table of this text. Returns the captions and what was printed."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    (folder / name).write_bytes(data)
    capsys.readouterr()
    run(folder / name, folder / "out", **more)
    return captions(folder / "out"), capsys.readouterr().out


def refusal(folder: Path, text: str, capsys: Capture, name: str = "t.csv", **more: object) -> str:
    """The line that is printed where a table of this text is refused."""
    with pytest.raises(SystemExit):
        pack_text(folder, text, capsys, name, **more)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_columns_of_hugging_face_and_those_that_are_named(folder: Path, capsys: Capture) -> None:
    assert pack_text(folder, "file_name,text\na.jpg,one\nb.jpg,two\n", capsys)[0] == ["one", "two"]
    table = "Picture,text,title\na.jpg,one,uno\nb.jpg,two,due\n"
    named = {"image_column": "Picture", "caption_column": "TITLE"}
    found, said = pack_text(folder, table, capsys, **named)
    assert found == ["uno", "due"] and said.startswith(
        "2 captions changed, 2 pictures with changed columns: shard 00000 written again"
    )
    assert "no column 'pictures' (did you mean 'Picture'?); its columns: Picture, text, title" in refusal(
        folder, table, capsys, image_column="pictures"
    )
    wide = refusal(folder, ",".join(f"column{i}" for i in range(500)) + "\n1\n", capsys)
    assert "has no column path or image" in wide and len(wide) < 700
    with pytest.raises(ValueError, match="image_column=, caption_column= and columns= are for tables, and source="):
        pack(Pack(str(folder), str(folder / "out"), image_column="x"))


def test_a_caption_with_a_comma_is_never_cut(folder: Path, capsys: Capture) -> None:
    table = 'path,caption\na.jpg,a cat, a dog, a bird, a fish\nb.jpg\n\n  \nb.jpg, "quoted, with ""marks"""\n'
    found, said = pack_text(folder, table, capsys)
    assert found == ['quoted, with "marks"'] and "1 of 3 pictures packed" in said
    assert "1 skipped, row has 5 fields, the header 2: quote captions that hold commas: a.jpg" in said
    assert "1 skipped, row has 1 field, the header 2: quote captions that hold commas: b.jpg" in said


def test_quotes_that_are_not_closed_cost_one_row(folder: Path, capsys: Capture) -> None:
    table = (
        'path,caption\na.jpg,"open\nb.jpg,two\na.jpg,"a\nline break"\nb.jpg,"closed" early\na.jpg,five\nb.jpg,"end\n'
    )
    found, said = pack_text(folder, table, capsys)
    assert found == ["two", "a\nline break", "five"]
    assert "not a row of a CSV" in said and "line 2" in said and "line 6" in said and "line 8" in said
    (folder / "out/00000.tar").unlink()
    found, said = pack_text(folder, 'path,caption\na.jpg,"' + "long " * 50_000 + '"\nb.jpg,two\n', capsys)
    assert found == ["two"] and "field larger than field limit" in said


def test_bytes_that_are_no_text_cost_one_row(folder: Path, capsys: Capture) -> None:
    table = b"path,caption\na.jpg,one\nb\0.jpg,two\nb.jpg,th\0ree\nb.jpg,fr\xfch\ncaf\xe9.jpg,five\nb.jpg,six\n"
    found, said = pack_text(folder, table, capsys)
    assert found == ["one", "six"]
    assert r"2 skipped, row holds a NUL: b\x00.jpg, b.jpg" in said
    assert "1 skipped, caption is not UTF-8: b.jpg" in said
    assert r"1 skipped, its path is not UTF-8 or holds a NUL: caf\udce9.jpg" in said
    assert pack_text(folder, "path,caption\na.jpg,früh\n".encode("utf-16"), capsys)[0] == ["früh"]


def test_values_are_not_repeated_in_full(folder: Path, capsys: Capture) -> None:
    path = "x" * 100_000
    found, said = pack_text(folder, f"path,caption\n{path},one\na.jpg,two\n{'y/' * 2500},three\n", capsys)
    assert found == ["two"] and "can't be read (File name too long)" in said
    assert max(len(line) for line in said.splitlines()) < 300
    line = refusal(folder, f"{path},caption\na.jpg,one\n", capsys)
    assert len(line) < 700
    with pytest.raises(SystemExit):
        run(Path("z" * 5000 + ".csv"), folder / "out")
    assert len(capsys.readouterr().err) < 500


def test_tables_without_rows(folder: Path, capsys: Capture) -> None:
    assert "has no column path or image" in refusal(folder, "", capsys)
    assert refusal(folder, "path,caption\n", capsys).endswith("' has no rows")
    assert "no column path or image" in refusal(folder, "", capsys, "t.jsonl")
    assert "is not a readable parquet file" in refusal(folder, "", capsys, "t.parquet")
    assert "is neither a folder nor a .csv, .jsonl, .parquet file" in refusal(folder, "path,caption", capsys, "t.xlsx")
    assert not (folder / "out").exists()


def test_json_lines(folder: Path, capsys: Capture) -> None:
    lines = [
        json.dumps({"file_name": "a.jpg", "text": "one"}), "", "{broken", "[1]", json.dumps({"text": "no path"}),
        json.dumps({"file_name": "b.jpg", "text": ["a", "b"]}), json.dumps({"file_name": "b.jpg", "text": "\ud800"}),
        json.dumps({"text": "two", "file_name": "b.jpg", "more": 1}), json.dumps({"file_name": "b.jpg", "text": 5}),
        "[" * 100_000,
    ]  # fmt: skip
    found, said = pack_text(folder, "\n".join(lines), capsys, "metadata.jsonl")
    assert found == ["one", "two", "5"]
    assert "3 skipped, not a JSON object: row 1, row 2, row 8" in said
    assert "1 skipped, no path: row 3" in said and "1 skipped, caption is not UTF-8: b.jpg" in said
    assert "1 skipped, its caption is a list, not a text: b.jpg" in said


def hugging_face(folder: Path, texts: list[str]) -> Path:
    """A parquet as Hugging Face's datasets writes it: bytes and path in one column, several groups of rows."""
    images = [
        {"bytes": picture("red"), "path": "0.jpg"}, {"bytes": picture("green", "PNG"), "path": None},
        {"bytes": None, "path": "b.jpg"}, {"bytes": b"no picture", "path": "3.jpg"}, None,
    ]  # fmt: skip
    table = pa.table({"image": images, "text": texts, "path": ["elsewhere"] * 5})
    pq.write_table(table, folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def test_a_parquet_with_the_pictures_bytes(folder: Path, capsys: Capture) -> None:
    out = folder / "out"
    run(hugging_face(folder, ["one", "two", "three", "four", "five"]), out)
    found = samples(out)
    assert captions(out) == ["one", "two", "three"] and list(by_name(out)) == ["0.jpg", "row 1", "b.jpg"]
    assert found[0][1]["jpg"] == picture("red") and found[1][1]["png"] == picture("green", "PNG")
    assert found[2][1]["jpg"] == (folder / "b.jpg").read_bytes()
    said = capsys.readouterr().out
    assert "1 skipped, not a JPEG or PNG: 3.jpg" in said and "1 skipped, no bytes of a picture: row 4" in said
    before = times(out)
    run(hugging_face(folder, ["one", "two", "three", "four", "five"]), out)
    assert times(out)["00000.tar"] == before["00000.tar"]
    run(hugging_face(folder, ["one", "zwei", "three", "four", "five"]), out)
    assert "1 caption changed: shard 00000 written again" in capsys.readouterr().out
    assert captions(out) == ["one", "zwei", "three"]


def test_a_parquet_with_a_column_of_bytes(folder: Path, capsys: Capture) -> None:
    table = pa.table({"jpeg": pa.array([picture("red"), None]), "caption": [b"one", b"two"]})
    pq.write_table(table, folder / "t.parquet")
    run(folder / "t.parquet", folder / "out", image_column="jpeg")
    assert captions(folder / "out") == ["one"] and samples(folder / "out")[0][1]["jpg"] == picture("red")
    with pytest.raises(SystemExit):
        run(folder / "t.parquet", folder / "out2")
    assert "no column path or image or" in capsys.readouterr().err


def test_damage_in_a_parquet_costs_its_group_of_rows(folder: Path, capsys: Capture) -> None:
    table = pa.table({"image": [picture("red"), picture("blue")], "text": ["one", "two"]})
    pq.write_table(table, folder / "t.parquet", row_group_size=1, compression="none", use_dictionary=False)
    data = bytearray((folder / "t.parquet").read_bytes())
    data[4:24] = bytes(20)
    (folder / "t.parquet").write_bytes(data)
    run(folder / "t.parquet", folder / "out")
    assert captions(folder / "out") == ["two"]
    assert "1 skipped, can't be read (" in capsys.readouterr().out


def test_what_cannot_be_packed_at_all_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no \.jpg, \.jpeg, \.png in"):
        _pack(empty, out)
    (empty / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds shards already"):
        _pack(empty, out)
    with pytest.raises(ValueError, match="neither a folder nor"):
        _pack(tmp_path / "nowhere", out)
    (tmp_path / "wrong.csv").write_text("picture,caption\na.jpg,a\n")
    with pytest.raises(
        ValueError, match=r"no column path or image or .*; its columns: picture, caption: name one by image"
    ):
        _pack(tmp_path / "wrong.csv", out)
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not a readable parquet"):
        _pack(tmp_path / "broken.parquet", out)
    assert not out.exists()
    put(empty, "alone.jpg", picture("red"))
    with pytest.raises(ValueError, match="none of 1 picture is usable; the reasons are above"):
        _pack(empty, out)
    assert "1 skipped, no .txt beside it: alone.jpg" in capsys.readouterr().out
    assert not list(out.glob("*.tar"))
