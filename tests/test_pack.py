"""Folders, tables and emoji packages become shards; what can't is skipped, counted and named."""

import codecs
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import fluent
from data.storage.shards import find_shards
from data.storage.tars import read_shard, stats_path
from tests.support.albums import captions, contents, picture, put, run, samples


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
    assert "5 of 11 pictures packed in 1 shard:" in said
    assert "1 skipped, truncated image: aa_cut.jpg" in said
    assert "1 skipped, not a JPEG or PNG: ab_text.jpg" in said
    assert "1 skipped, a WebP (allow_webp=true takes it): ae_webp.jpg" in said
    assert "1 skipped, no .txt beside it: ac_alone.jpg" in said
    assert "1 skipped, empty caption: ad_blank.jpg" in said
    assert "1 skipped, caption is not UTF-8: af_latin.jpg" in said
    stats = json.loads(stats_path(tmp_path / "out/00000.tar").read_text())
    assert (stats["count"], stats["successes"]) == (5, 5)
    listed = (tmp_path / "out/skipped.tsv").read_text().splitlines()
    assert len(listed) == 6 and "ac_alone.jpg\tno .txt beside it" in listed
    assert f"all that were skipped are listed in {tmp_path / 'out/skipped.tsv'}" in said
    # A rerun finds all done and says the same again.
    run(album, tmp_path / "out")
    assert capsys.readouterr().out == said


def test_a_picture_is_known_by_its_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("a.jfif", "b.jpe", "c.JPG", "d", "e.webp", "v1.5 sunset", "png.jpg"):
        put(source, name, picture("red", "PNG" if name == "png.jpg" else "JPEG"), name)
    (source / "c.txt").rename(source / "c.TXT")
    (source / "v1.txt").rename(source / "v1.5 sunset.txt")
    put(source, "f.jpg", picture("red"))
    (source / "f.jpg.txt").write_text("a name with its suffix")
    for name, form in (("g.gif", "GIF"), ("h.JPG", "GIF"), ("i.bmp", "BMP"), ("j.tif", "TIFF"), ("k.webp", "WEBP")):
        put(source, name, picture("red", form), name)
    put(source, "l.jpg", b"", "empty")
    put(source, ".hidden.jpg", picture("red"), "hidden")
    put(source, ".git/m.jpg", picture("red"), "hidden")
    (source / "n.json").write_text("{}")
    (source / "notes.md").write_text("BMW")
    (source / "album").symlink_to(tmp_path)
    (source / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.jpg")
    run(source, out)
    assert captions(out) == [
        "a.jfif",
        "b.jpe",
        "c.JPG",
        "d",
        "e.webp",
        "a name with its suffix",
        "png.jpg",
        "v1.5 sunset",
    ]
    assert [name for _, members in samples(out) for name in ("jpg", "png") if name in members] == (
        ["jpg"] * 6 + ["png", "jpg"]
    )
    lines = capsys.readouterr().out
    for line in (
        "8 of 17 pictures packed in 1 shard:",
        "2 skipped, a GIF: g.gif, h.JPG",
        "1 skipped, a BMP: i.bmp",
        "1 skipped, a TIFF: j.tif",
        "1 skipped, a WebP (allow_webp=true takes it): k.webp",
        "1 skipped, an empty file: l.jpg",
        "1 skipped, not a picture: notes.md",
        "1 skipped, a link to a folder, which is not followed: album",
    ):
        assert line in lines


def test_webp_where_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    put(source, "a.webp", picture("red", "WEBP"), "a")
    put(source, "b.jpg", picture("red"), "b")
    run(source, out)
    assert captions(out) == ["b"]
    run(source, out, allow_webp=True)
    assert captions(out) == ["b", "a"] and "1 picture added" in capsys.readouterr().out
    assert samples(out)[1][1]["webp"] == (source / "a.webp").read_bytes()
    run(source, out)
    assert captions(out) == ["b"] and "1 picture removed" in capsys.readouterr().out


def test_captions_without_a_mark_in_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "a": codecs.BOM_UTF8 + "früh".encode(),
        "b": codecs.BOM_UTF8,
        "c": "früh".encode("utf-16"),
        "d": codecs.BOM_UTF16_BE + "früh".encode("utf-16-be"),
        "e": "früh".encode("latin-1"),
        "f": "fruh".encode("utf-16-le"),
        "g": b"\xff\xfea",
    }
    for name, text in texts.items():
        put(tmp_path / "source", f"{name}.jpg", picture("red"), text)
    run(tmp_path / "source", tmp_path / "out")
    assert captions(tmp_path / "out") == ["früh"] * 3
    said = capsys.readouterr().out
    assert "1 skipped, empty caption: b.jpg" in said and "3 skipped, caption is not UTF-8: e.jpg, f.jpg, g.jpg" in said


def test_a_name_that_is_not_utf8_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    put(source, "a.jpg", picture("red"), "a")
    for suffix, data in ((b"jpg", picture("red")), (b"txt", b"latin"), (b"TXT", b"")):
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9." + suffix)).write_bytes(data)
    put(source, "line\nbreak.gif", picture("red", "GIF"), "b")
    put(source, "x" * 200 + ".gif", picture("red", "GIF"), "c")
    run(source, tmp_path / "out")
    assert captions(tmp_path / "out") == ["a"]
    said = capsys.readouterr().out
    assert r"1 skipped, its path is not UTF-8 or holds a NUL: caf\udce9.jpg" in said
    assert r"2 skipped, a GIF: line\nbreak.gif, xxx" in said
    assert max(map(len, said.splitlines()[1:])) < 250


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
