"""Folders, tables and emoji packages become shards; what can't is skipped, counted and named."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import fluent, pack
from data.storage.shards import find_shards
from data.storage.tars import read_shard, stats_path

MEMBERS = {"jpg", "png", "webp", "txt", "json"}


def picture(colour: str, form: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, form)
    return data.getvalue()


def put(folder: Path, name: str, image: bytes, caption: str | None = None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def run(source: Path, out: Path, shard_size: int = 1000) -> None:
    pack.pack(pack.Pack(str(source), str(out), shard_size))


def samples(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    return [sample for shard in find_shards(folder) for sample in read_shard(shard.location, MEMBERS)]


def captions(folder: Path) -> list[str]:
    return [members["txt"].decode() for _, members in samples(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Five good pictures and one of each fault."""
    folder = tmp_path / "album"
    put(folder, "b/2.JPG", picture("blue"), "ein blaues Bild: früh\n")
    put(folder, "a.png", picture("red", "PNG"), "red")
    put(folder, "b/1.jpeg", picture("green"), "green")
    put(folder, "c.jpg", picture("black"), "black")
    put(folder, "d.jpg", picture("white"), "white")
    put(folder, "aa_cut.jpg", picture("red", size=(300, 300))[:900], "cut short")
    put(folder, "ab_text.jpg", b"no picture at all", "text")
    put(folder, "ac_alone.jpg", picture("red"))
    put(folder, "ad_blank.jpg", picture("red"), "  \n")
    put(folder, "ae_webp.jpg", picture("red", "WEBP"), "webp in disguise")
    put(folder, "af_latin.jpg", picture("red"))
    (folder / "af_latin.txt").write_bytes("früh".encode("latin-1"))
    return folder


def test_a_folder_goes_in_byte_for_byte_in_order_of_path(album: Path, tmp_path: Path) -> None:
    run(album, tmp_path / "out", shard_size=2)
    found = samples(tmp_path / "out")
    assert [key for key, _ in found] == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    assert captions(tmp_path / "out") == ["red", "green", "ein blaues Bild: früh", "black", "white"]
    assert found[0][1]["png"] == (album / "a.png").read_bytes()
    assert found[2][1]["jpg"] == (album / "b/2.JPG").read_bytes()
    facts = json.loads(found[2][1]["json"])
    assert facts == {
        "caption": "ein blaues Bild: früh",
        "url": "b/2.JPG",
        "key": "000010000",
        "status": "success",
        "width": 40,
        "height": 30,
    }


def test_faults_are_counted_by_reason_and_named(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(album, tmp_path / "out")
    said = capsys.readouterr().out
    assert "5 of 11 pictures packed in 1 shards" in said
    assert "1 skipped, truncated image: aa_cut.jpg" in said
    assert "2 skipped, not a JPEG or PNG: ab_text.jpg, ae_webp.jpg" in said
    assert "1 skipped, no .txt beside it: ac_alone.jpg" in said
    assert "1 skipped, empty caption: ad_blank.jpg" in said
    assert "1 skipped, caption is not UTF-8: af_latin.jpg" in said
    stats = json.loads(stats_path(tmp_path / "out/00000.tar").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]["not a JPEG or PNG"]) == (11, 5, 2)
    # A rerun finds all done and says the same again.
    run(album, tmp_path / "out")
    assert capsys.readouterr().out == said


def test_a_rerun_makes_what_is_missing_as_it_was(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(album, out, shard_size=2)
    whole = contents(out)
    untouched = (out / "00002.tar").stat().st_mtime_ns
    (out / "00000.tar").unlink()
    # As if stopped between a tar and its stats.
    stats_path(out / "00001.tar").unlink()
    run(album, out, shard_size=2)
    assert contents(out) == whole
    assert (out / "00002.tar").stat().st_mtime_ns == untouched


def test_a_folder_holds_one_dataset(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(album, out)
    with pytest.raises(ValueError, match=r"shard_size=1000 \(now 7\)"):
        run(album, out, shard_size=7)
    put(album, "new.jpg", picture("red"), "new")
    with pytest.raises(ValueError, match=r"rows=11 \(now 12\)"):
        run(album, out)
    (out / "pack.json").unlink()
    with pytest.raises(ValueError, match=r"shards of another command \(no pack\.json\)"):
        run(album, out)


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


def test_what_cannot_be_packed_at_all_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no \.jpg, \.jpeg, \.png in"):
        run(empty, out)
    (empty / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds shards already"):
        run(empty, out)
    with pytest.raises(ValueError, match="neither a folder nor"):
        run(tmp_path / "nowhere", out)
    (tmp_path / "wrong.csv").write_text("picture,caption\na.jpg,a\n")
    with pytest.raises(ValueError, match=r"no column path or image or file or url; its columns: picture, caption"):
        run(tmp_path / "wrong.csv", out)
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not a readable parquet"):
        run(tmp_path / "broken.parquet", out)
    assert not out.exists()
    put(empty, "alone.jpg", picture("red"))
    with pytest.raises(ValueError, match="none of the 1 pictures is usable; the reasons are above"):
        run(empty, out)
    assert "1 skipped, no .txt beside it: alone.jpg" in capsys.readouterr().out
    assert not list(out.glob("*.tar"))


def packages(folder: Path) -> Path:
    """The emoji's three packages in small: the same layout, real WebP."""
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    half.paste((200, 0, 0, 255), (0, 0, 16, 32))
    data = io.BytesIO()
    half.save(data, "WEBP", lossless=True)
    names = ["00a9-fe0f", "1f468-200d-1f466", "1f3fb", "1f1e6-1f1e8", "1f600", "1f3f4-e0067_e0062"]
    archive(folder / fluent.PICTURES, {f"package/assets/{name}.webp": data.getvalue() for name in names})
    base = {"©": {"tts": ["copyright"]}, "🏻": {"tts": ["light skin tone"]}, "☃": {"default": ["snow"]}}
    derived = {"👨\u200d👦": {"tts": ["family: man, boy"]}, "🇦🇨": {"tts": ["flag: Ascension Island"]}}
    for (file, kind), names_there in zip(fluent.NAMES.items(), (base, derived), strict=True):
        content = json.dumps({kind: {"annotations": names_there}}).encode()
        archive(folder / file, {f"package/{kind}/en/annotations.json": content})
    return folder


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_emoji_with_a_name_become_pictures_on_white(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [f"packages={packages(tmp_path)}", f"out={out}"]
    fluent.main(arguments)
    assert captions(out) == ["copyright", "family: man, boy"]
    _, members = samples(out)[0]
    pixels = np.asarray(Image.open(io.BytesIO(members["jpg"]), formats=["JPEG"])).astype(int)
    assert abs(pixels[:, 4] - [200, 0, 0]).max() < 6
    assert abs(pixels[:, 28] - 255).max() < 6
    whole = contents(out)
    (out / "00000.tar").unlink()
    fluent.main(arguments)
    assert contents(out) == whole


def test_missing_packages_are_named_with_the_command_that_gets_them(tmp_path: Path) -> None:
    (packages(tmp_path) / fluent.PICTURES).unlink()
    with pytest.raises(ValueError, match=r"lacks lobehub-fluent.*npm pack @lobehub/fluent-emoji-3d@1.1.0"):
        fluent.write_fluent(fluent.Fluent(str(tmp_path), str(tmp_path / "out")))


def test_img2datasets_own_shards_are_read_as_they_are() -> None:
    shared = Path(os.environ.get("IF_SHARED", Path(__file__).parents[1].parent / "shared"))
    folder = shared / "data/fluent"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set IF_SHARED to the folder with data/fluent")
    shards = find_shards(folder)
    assert sum(shard.count for shard in shards) == 1563
    found = dict(read_shard(shards[0].location, {"jpg", "txt", "json"}))
    assert len(found) == shards[0].count == 100
    for key, members in found.items():
        facts = json.loads(members["json"])
        assert facts["key"] == key and facts["caption"] == members["txt"].decode()
        assert Image.open(io.BytesIO(members["jpg"]), formats=["JPEG"]).size == (facts["width"], facts["height"])
