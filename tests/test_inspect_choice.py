"""data.inspect with rules: what they choose, scores with their thresholds, near duplicates, scripts of captions."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.index import Index, index
from data.inspect import Inspect, inspect
from data.inspection import chart, choice, findings
from data.inspection.caption_facts import script, scripts, token_counts
from data.inspection.duplicates import fingerprint, near_duplicates
from data.inspection.findings import Findings, choose_tiles
from data.selection.drop import read_list
from data.selection.where import Threshold, Where, reference
from data.storage.tars import read_shard, write_shard
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.test_inspect import Page

SAMPLES, SHARDS = 120, 3
WHERE = "score >= 0.5 and min(width, height) < 70 and not label == 'b'"
HOSTILE = "<img src=x onerror='alert(1)'>"


def picture(n: int, size: int = 60, quality: int = 90) -> bytes:
    """A picture of its own for each number, in any size and quality."""
    blocks = np.random.default_rng(n).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC).save(data, "JPEG", quality=quality)
    return data.getvalue()


def facts(n: int) -> dict:
    score = {} if n % 10 == 9 else {"score": n / SAMPLES}
    return {"width": 60 + n % 20, "height": 100, "label": "ab"[n % 4 == 0], HOSTILE: n, **score}


def fails(n: int) -> list[bool]:
    """Of the conditions of WHERE."""
    return [facts(n).get("score", 0) < 0.5, facts(n)["width"] >= 70, n % 4 == 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each 8th sample has a smaller copy of the picture before it."""
    base = tmp_path_factory.mktemp("choice") / "shards"
    for shard in range(SHARDS):
        rows = []
        for n in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
            image = picture(n - 1, 50, 60) if n % 8 == 7 else picture(n)
            json_ = json.dumps(facts(n)).encode()
            rows.append((f"{n:09d}", {"jpg": image, "txt": b"a caption", "json": json_}))
        write_shard(base / f"{shard:05d}.tar", rows)
    return base


@pytest.fixture(scope="module")
def report(folder) -> tuple[Findings, str]:
    """What is found with WHERE, a list and a share, and the page."""
    (folder.parent / "removed.txt").write_text("000000101\n000000102\n")
    out = folder.parent / "rules.html"
    found = inspect(
        Inspect(str(folder), str(out), samples=0, where=WHERE, drop=[str(folder.parent / "removed.txt")],
                validation_share=0.2, workers=1)
    )  # fmt: skip
    return found, out.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a >= 0.5", [("a", ">=", 0.5)]),
        ("0.5 < a and b is None", [("a", ">", 0.5)]),
        ("-1 <= a < 2", [("a", ">=", -1.0), ("a", "<", 2.0)]),
        ("not (a < 1 or b > 2)", [("a", ">=", 1.0), ("b", "<=", 2.0)]),
        ("min(a, b) >= 64 or len(t) > 3", [("min(a, b)", ">=", 64.0), ("len(t)", ">", 3.0)]),
        ("field('a b') > 1 and field('a') > 1", [("field('a b')", ">", 1.0), ("a", ">", 1.0)]),
        ("a < b and t == 'x' and a == 3", []),
        ("a > 1 and a > 1", [("a", ">", 1.0)]),
    ],
)
def test_thresholds_of_an_expression(text, expected):
    assert Where(text).thresholds() == [Threshold(*threshold) for threshold in expected]
    for name in ("a", "a b", "is", "x'\"\n"):
        assert Where(f"{reference(name)} > 0").fields == {name}


def test_conditions_nested_too_deeply_are_refused_in_one_line():
    for depth in (100, 200, 300, 450, 600, 900):
        try:
            where = Where("not " * depth + "a > 1 and b > 2")
            where.parts()
            where.thresholds()
        except ValueError as error:
            assert "nested too deeply" in str(error)


def test_counts_are_those_of_the_index(folder, report, capsys):
    found, html = report
    seen = found.choice
    outcome = np.array([fails(n) for n in range(SAMPLES)])
    assert [(part.fails, part.alone) for part in seen.parts] == [
        (int(outcome[:, i].sum()), int((outcome[:, i] & (outcome.sum(1) == 1)).sum())) for i in range(3)
    ]
    assert [part.missing for part in seen.parts] == [SAMPLES // 10, 0, 0]
    removed = str(folder.parent / "removed.txt")
    copy = Path(shutil.copytree(folder, folder.parent / "indexed"))
    capsys.readouterr()
    index(Index(str(copy), where=WHERE, drop=[removed], validation_share=0.2, workers=1))
    printed = capsys.readouterr().out
    assert seen.receipt.lines() == [line for line in printed.splitlines() if line in seen.receipt.lines()]
    assert seen.receipt.held and seen.receipt.rules[1].took == 2 - (facts(102)["width"] >= 70) - (
        facts(101)["width"] >= 70
    )
    assert seen.receipt.chosen == (~outcome.any(1)).sum() - seen.receipt.rules[1].took - seen.receipt.held
    words = Page(html).words
    assert f"{seen.receipt.chosen:,} of 120 samples of all shards" in words and "validation_share=0.2" in words


def test_page_is_safe_and_has_each_score(report):
    found, html = report
    page = Page(html)
    assert {"svg", "path", "polyline"} <= {tag for tag, _ in page.tags}
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "base", "form", "use"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        sources = [value or "" for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        assert all(re.match("data:image/(png|jpeg);base64,", source) for source in sources)
    assert HOSTILE in page.words  # as text
    assert list(found.choice.values.numbers)[:2] == ["score", "min(width, height)"]
    assert found.choice.texts["label"] == {"a": 90, "b": 30}
    assert html.count("<svg") == 5 and html.count('class="at"') == 2
    assert len(html) < 500_000


def test_chosen_and_left_out_are_shown_beside_each_other(report):
    found, html = report
    for tile in found.tiles:
        n = int(tile.name.split(":")[1])
        assert (tile.taken == 1) == any(fails(n)) and (tile.taken == 2) == (n in (101, 102) and not any(fails(n)))
    taken = [tile.taken for tile in found.tiles]
    assert taken.count(0) == min(48, found.choice.receipt.chosen) and set(taken) >= {0, 1, 3}
    left, right = html.split('<div class="beside">')[1].split("<h2>Scores")[0].split("</div></div><div>")
    assert left.count("<img") == taken.count(0) and right.count("<img") == len(taken) - taken.count(0)
    assert "where score &gt;= 0.5" in right and "validation share 0.2" in right


def test_tiles_are_spread_over_what_was_taken():
    taken = np.array([0] * 1000 + [1] * 500 + [3] * 5)
    places = np.array(sorted(choose_tiles(taken)))
    assert [int((taken[places] == rule).sum()) for rule in (0, 1, 3)] == [48, 24, 5]
    assert places[0] == 0 and places[47] > 950
    assert len(choose_tiles(np.zeros(5000, int))) == 96 and choose_tiles(np.zeros(0, int)) == set()


def test_pictures_beside_a_threshold_are_the_nearest(report):
    html = report[1]
    strip = html.split("<h3>score</h3>")[1].split('<div class="strip">')[2].split("</div>")[0]
    below, above = strip.split('<span class="side">left out | kept')
    shown = [[float(v) for v in re.findall(r'quiet">([\d.]+)<', side)] for side in (below, above)]
    scores = np.array([facts(n)["score"] for n in range(SAMPLES) if "score" in facts(n)])
    low, high = scores[scores < 0.5][-7:], scores[scores >= 0.5][:7]
    np.testing.assert_allclose(shown, [low, high], rtol=1e-3)


def test_share_table_gives_thresholds_that_keep_the_share():
    values = np.concatenate([np.random.default_rng(0).normal(size=900), np.full(100, np.nan)])
    rows = re.findall(r'"n">(\d+)%</td><td class="n">([-\d.]+)</td><td class="n">([-\d.]+)<', chart.share_table(values))
    assert [int(share) for share, _, _ in rows] == [90, 75, 50, 25, 10, 5, 1]  # a tenth has no value
    for share, least, most in rows:
        for threshold in (Threshold("a", ">=", float(least)), Threshold("a", "<=", float(most))):
            assert chart.keeps(values, threshold) == pytest.approx(int(share) / 100, abs=0.002)
    assert chart.share_table(np.full(3, np.nan)) == ""


def test_line_tells_the_share_that_is_left():
    values, out = np.arange(1000) / 1000, np.arange(1000) >= 600
    for op, rising in ((">=", False), ("<", True)):
        svg = chart.chart(values, out, [Threshold("a", op, 0.25)])
        points = [tuple(map(float, p.split(","))) for p in svg.split('points="')[1].split('"')[0].split()]
        at = float(re.search(r'class="at" d="M([\d.]+)', svg)[1])
        height = np.interp(at, *np.transpose(points))
        share = 1 - (height - chart.TOP) / chart.HEIGHT
        assert share == pytest.approx(0.25 if rising else 0.75, abs=0.03)
    kept = svg.split('class="kept" d="')[1].split('"')[0]
    assert max(float(x) for x in re.findall(r"H([\d.]+)", kept)) == pytest.approx(
        chart.LEFT + 0.6 * chart.WIDTH, abs=15
    )


@pytest.mark.parametrize(
    "values",
    [
        [], [np.nan], [np.inf, -np.inf], [3.0] * 5, [0.0, 1e308, -1e308, np.inf], [1e-320, 0.0], [5e15, 5e15 + 2],
        [1, 2, 2, 7], [-1e-9, 1e-9, np.nan],
    ],
)  # fmt: skip
def test_odd_values_are_drawn_or_left_out(values):
    with np.errstate(all="raise", under="ignore"):
        array = np.array(values, float)
        for number in (0.5, 1e300, float("inf")):
            svg = chart.chart(array, np.zeros(len(array), bool), [Threshold("a", ">", number)])
            assert "nan" not in svg and "inf" not in svg.replace("&gt; inf", "")
            assert bool(svg) == bool(np.isfinite(array).any())
            chart.share_table(array)


def test_near_duplicates_are_found_and_their_list_can_be_dropped(folder, tmp_path, capsys):
    found = inspect(Inspect(str(folder), str(tmp_path / "all.html"), samples=0, workers=1))
    pairs = [[f"{n - 1:09d}", f"{n:09d}"] for n in range(7, SAMPLES, 8)]
    assert [[one.key for one in group] for group in found.duplicates] == pairs  # the larger one first
    assert "15 in 15 groups" in capsys.readouterr().out
    listed = tmp_path / "all-near-duplicates.csv"
    before = listed.read_bytes()
    assert len(read_list(str(listed)).hashes) == 15
    again = inspect(Inspect(str(folder), str(tmp_path / "all.html"), samples=0, drop=[str(listed)], workers=1))
    assert not again.duplicates and again.choice.receipt.chosen == SAMPLES - 15
    left = {tile.name.split(":")[1] for tile in again.tiles if tile.taken}
    assert left == {pair[1] for pair in pairs} and listed.read_bytes() == before
    # Of pictures that `where` leaves out no list is made.
    some = inspect(Inspect(str(folder), str(tmp_path / "some.html"), samples=0, where="label == 'a'", workers=1))
    assert len(some.duplicates) == 15 and not (tmp_path / "none-near-duplicates.csv").exists()
    none = inspect(Inspect(str(folder), str(tmp_path / "none.html"), samples=0, where="width < 66", workers=1))
    expected = [pair for pair in pairs if all(facts(int(key))["width"] < 66 for key in pair)]
    assert [[one.key for one in group] for group in none.duplicates] == expected


def test_a_list_that_is_in_use_is_not_written_over(folder, tmp_path, capsys):
    listed = tmp_path / "r-near-duplicates.csv"
    listed.write_text("key,group\n000000006,1\n000000007,1\n")
    inspect(Inspect(str(folder), str(tmp_path / "r.html"), samples=0, drop=[str(listed)], workers=1))
    assert "is kept as it is" in capsys.readouterr().out and listed.read_text().count("\n") == 3


def test_no_list_where_keys_repeat(tmp_path, capsys):
    for shard in range(2):
        rows = [(f"{n}", {"jpg": picture(n, 40 + shard), "txt": b"c"}) for n in range(4)]
        write_shard(tmp_path / "shards" / f"{shard:05d}.tar", rows)
    found = inspect(Inspect(str(tmp_path / "shards"), str(tmp_path / "r.html"), workers=1))
    assert len(found.duplicates) == 4 and "no list for drop=" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.csv")) and "No sample has a field" in (tmp_path / "r.html").read_text()


def test_what_near_duplicates_are():
    def disc(colour: str, size: int = 90) -> Image.Image:
        grid = np.linalg.norm(np.mgrid[:size, :size] - size / 2, axis=0) < size / 3
        paint = Image.new("RGB", (size, size), "white")
        paint.paste(Image.new("RGB", (size, size), colour), mask=Image.fromarray((grid * 255).astype(np.uint8)))
        return paint

    # Colours of equal brightness: the hashes are equal, the pictures are not.
    discs = [fingerprint(disc(colour)) for colour in ("#ff0000", "#008200", "#0000ff")]
    assert near_duplicates(discs) == []
    prints = [fingerprint(Image.open(io.BytesIO(picture(n)))) for n in range(300)]
    assert near_duplicates(prints) == [] == near_duplicates([]) == near_duplicates(prints[:1])
    copies = [fingerprint(Image.open(io.BytesIO(picture(n, 200, 50)))) for n in range(0, 300, 3)]
    assert near_duplicates(prints + copies) == [[3 * i, 300 + i] for i in range(100)]
    # Very many equal ones are one group, and a picture is near the first of its group.
    assert near_duplicates([discs[0], *[discs[1]] * 500, discs[0]]) == [[0, 501], list(range(1, 501))]
    grey = [fingerprint(Image.new("RGB", (50, 50), (level, level, level))) for level in range(0, 100, 15)]
    assert near_duplicates(grey) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red circle", "Latin"), ("красный круг", "Cyrillic"), ("一个红圆 red", "Chinese characters"),
        ("赤い丸", "Japanese (with kana)"), ("دائرة", "Arabic"), ("12 34 !", "no letters"),
        ("\uff32\uff25\uff24", "Latin"), ("", "no letters"), ("\ue000\ud83d", "no letters"), ("빨간 원", "Hangul"),
    ],
)  # fmt: skip
def test_script_of_a_caption(caption, expected):
    assert script(caption) == expected and scripts([caption, "x"])[expected] >= 1


def test_tokens_are_those_of_the_encoder(tmp_path):
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5")))
    meta = TextMeta(str(tmp_path / "t5"), "", "", 6, 32, "float32", "float32", "if-1")
    captions = ["a red circle", "a large blue square on the left of a small green circle", ""]
    found = token_counts(captions, meta)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t5")
    assert found == [len(tokenizer(caption)["input_ids"]) for caption in captions] and found[1] > 6
    assert token_counts(captions, None) is None
    meta.encoder = str(tmp_path / "gone")
    assert token_counts(captions, meta) is None


def test_what_cannot_be_chosen_by_is_refused(folder, tmp_path):
    for wrong, said in (
        ({"where": "scor > 1"}, "did you mean 'score'"),
        ({"where": "label > 1"}, "compares a text with a number"),
        ({"drop": ["gone.csv"]}, "gone.csv"),
        ({"validation_share": 2.0}, "share=2.0"),
        ({"workers": 0}, "workers=0"),
    ):
        with pytest.raises((ValueError, OSError), match=re.escape(said)):
            inspect(Inspect(**{"shards": str(folder), "out": str(tmp_path / "r.html"), "workers": 1, **wrong}))
    assert not list(tmp_path.iterdir())


def test_fields_that_cannot_be_read_are_told(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "shards"))
    (copy / "00001.parquet").write_bytes(b"PAR1 no")
    inspect(Inspect(str(copy), str(tmp_path / "r.html"), samples=20, workers=1))
    assert "00001.parquet' is not a readable parquet" in capsys.readouterr().out
    assert "not a readable parquet" in Page((tmp_path / "r.html").read_text()).words
    with pytest.raises(ValueError, match="not a readable parquet"):
        inspect(Inspect(str(copy), str(tmp_path / "s.html"), where="score > 0", workers=1))


def test_distributions_of_many_samples_are_of_some_spread_evenly(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "MAX_ROWS", 30)
    monkeypatch.setattr(findings, "MAX_SHARDS", 2)
    found = inspect(Inspect(str(folder), str(tmp_path / "r.html"), samples=10, where="width >= 0", workers=1))
    # Of two of the three shards; of every third of their 80 samples.
    assert found.choice.receipt.samples == 80 and len(found.choice.values.taken) == 27
    ends = found.choice.values.numbers["width"]
    assert set(ends.tolist()) == {60.0 + n % 20 for n in [*range(0, 40, 3), *range(42, 80, 3)]}
    words = Page((tmp_path / "r.html").read_text()).words
    assert "80 of 80 samples of 2 of 3 shards" in words and "The command counts all." in words


def test_pictures_on_the_right_of_a_sheet_are_those_that_rules_took(folder, tmp_path):
    found = inspect(Inspect(str(folder), str(tmp_path / "s.png"), samples=0, where="score >= 0.5", workers=1))
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    step = 64 * 2 + 10
    red = (sheet[9, :, :] == [255, 0, 0]).all(1)
    assert red.any() and red[: 4 * step].sum() == 0
    taken = next(tile for tile in found.tiles if tile.taken)
    shown = sheet[10:138, 10 + 4 * step :][:, :128]
    assert (shown == taken.pixels.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)).all()


def test_rules_where_no_picture_can_be_shown(tmp_path):
    rows = [(f"{n}", {"jpg": b"no picture", "txt": b"c", "json": json.dumps(facts(n)).encode()}) for n in range(5)]
    write_shard(tmp_path / "shards" / "00000.tar", rows)
    for where in ("score > 0.02", "score > 2"):
        inspect(Inspect(str(tmp_path / "shards"), str(tmp_path / "r.html"), where=where, workers=1))
        page = Page((tmp_path / "r.html").read_text())
        assert "What the network sees" in page.words and "5 of 5" in page.words
        assert "img" not in {tag for tag, _ in page.tags}


def test_the_list_of_near_duplicates_is_named_safely_for_a_page_and_a_shell(folder, tmp_path, capsys):
    out = tmp_path / "<b onclick=x>'a & b" / "r.html"
    inspect(Inspect(str(folder), str(out), samples=0, workers=1))
    page, named = Page(out.read_text()), str(out.with_name("r-near-duplicates.csv"))
    assert "b" not in {tag for tag, attributes in page.tags if attributes} and f"{named} lists them" in page.words
    said = capsys.readouterr().out.split("lists them: ")[1].split(" keeps the first")[0]
    assert shlex.split(said) == [f"drop={named}"]


def test_real_pictures_of_which_many_are_alike(shared, tmp_path):
    """Fluent's people: a man and a person of one trade, drawn alike."""
    (tmp_path / "shards").mkdir()
    for number in (4, 12):
        source = shared / "data" / "fluent" / f"{number:05d}.tar"
        write_shard(tmp_path / "shards" / source.name, list(read_shard(source, {"jpg", "txt", "json"})))
    found = inspect(Inspect(str(tmp_path / "shards"), str(tmp_path / "r.html"), samples=0, workers=1))
    assert ["0000416", "0000452", "0001219"] in [[one.key for one in group] for group in found.duplicates]
    assert 10 <= len(found.duplicates) <= 40
