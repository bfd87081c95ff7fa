"""Several captions a sample: where they lie, which is drawn, what is embedded, and what a run keeps of them."""

import io
import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import CaptionConfig, DataConfig
from data.inspect import Inspect, inspect
from data.loader.cursor import ShardCursor, choose_caption
from data.loader.dataset import find_datasets
from data.loader.draws import Draw, Draws
from data.loader.prompts import stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.storage.caption_fields import MAX_JSON, caption_extensions, find_captions
from data.storage.shards import find_shards
from data.storage.tars import read_shard, write_shard
from data.text.embeddings import from_bytes, to_bytes
from data.text.meta import TextMeta
from train.evaluation.eval_set import EvalSet

TOKENS, DIM = 4, 8
# By field, how a sample's caption lies in the shard and how its embedding is marked.
FIELDS = ("txt", "recaption", "alt")
SHARDS, PER_SHARD = 4, 11
N = SHARDS * PER_SHARD


@cache
def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def members_of(n: int, fields: tuple[str, ...]) -> dict[str, bytes]:
    """A sample whose captions lie in the three places there are."""
    texts = {field: f"{field} of {n}" for field in fields}
    facts = {"width": n} | ({"alt": texts.pop("alt")} if "alt" in texts else {"alt": None})
    places = {"txt": "txt", "recaption": "recaption.txt" if n % 2 else "recaption"}
    return {
        "jpg": jpeg(),
        **{places[field]: text.encode() for field, text in texts.items()},
        "json": json.dumps(facts).encode(),
    }


def present(n: int) -> tuple[str, ...]:
    """The captions that sample n has: most have all, 7 has none."""
    lacking = {3: {"txt"}, 7: set(FIELDS), 12: {"recaption"}, 20: {"alt", "txt"}, 30: {"alt"}, 33: {"recaption", "alt"}}
    return tuple(field for field in FIELDS if field not in lacking.get(n, ()))


def marked(n: int, field: str) -> float:
    """The value of an embedding, which tells the sample and the caption."""
    return 100.0 * FIELDS.index(field) + n


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Shards, and in text an embedding of each caption that tells whose it is."""
    base = tmp_path_factory.mktemp("several")
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        name = f"{shard:05d}.tar"
        write_shard(base / "shards" / name, [(f"{n:05d}", members_of(n, present(n))) for n in numbers])
        for field in FIELDS:
            rows = [
                (f"{n:05d}", {"npy": to_bytes(np.full((TOKENS, DIM), marked(n, field), np.float32))})
                for n in numbers
                if field in present(n)
            ]
            write_shard(base / "text" / ("" if field == "txt" else field) / name, rows)
    TextMeta("none", "0", "0", TOKENS, DIM, "float32", "float32", "none").write(base / "text")
    (base / "text" / "empty.npy").write_bytes(to_bytes(np.full((TOKENS, DIM), -1, np.float32)))
    return base


def weighted(**weights: float) -> list[CaptionConfig]:
    return [CaptionConfig(field, weight) for field, weight in weights.items()]


EVEN = weighted(txt=1.0, recaption=1.0, alt=1.0)


def config_of(base: Path, captions: list[CaptionConfig], **settings) -> DataConfig:
    usual = {"streams": 2, "phases": 1, "shuffle_block": 5, "cond_drop_prob": 0.0}
    return DataConfig(shards=str(base / "shards"), text=str(base / "text"), captions=captions, **{**usual, **settings})


def read(config: DataConfig, steps: range, global_batch: int, ranks: int = 1, micro_batch: int = 1, workers: int = 0):
    """visit, mark of the embedding and weight of each sample in the order of the whole run, and lacking captions."""
    datasets, meta = find_datasets(config), TextMeta.read(config.text)
    each, parts, lacks = global_batch // ranks, [], 0
    for rank in range(ranks):
        stream = MicroBatches(
            config, datasets, meta, image_size=8, seed=3, global_batch=global_batch, micro_batch=micro_batch, rank=rank,
            ranks=ranks, step=steps.start,
        )  # fmt: skip
        source = micro_batches(stream, workers, pin_memory=False)
        got = [next(source) for _ in range(len(steps) * each // micro_batch)]
        lacks += sum(int(batch.lacks) for batch in got)
        rows = [(b.visit, b.text_emb[:, 0, 0].double(), b.weight.double()) for b in got]
        parts.append([torch.cat(column).unflatten(0, (len(steps), each)) for column in zip(*rows, strict=True)])
    return [torch.cat(column, 1).flatten().tolist() for column in zip(*parts, strict=True)], lacks


def chosen(visit: int, captions: list[CaptionConfig], seed: int = 3) -> str | None:
    """The field that must be drawn, by the definition and in NumPy's terms alone."""
    bits = np.random.Philox(np.random.SeedSequence([seed, 7]))
    state = bits.state
    state["state"]["counter"][1] = visit
    bits.state = state
    there = [caption for caption in captions if caption.field in present(visit % N)]
    total = sum(caption.weight for caption in there)
    draw, end = np.random.Generator(bits).random() * total, 0.0
    for caption in there:
        end += caption.weight
        if draw < end:
            return caption.field
    return None


some_captions = st.lists(st.tuples(st.sampled_from(FIELDS), st.floats(0.1, 4)), min_size=2, max_size=3).filter(
    lambda pairs: len({field for field, _ in pairs}) == len(pairs)
)


@settings(max_examples=10, deadline=None)
@given(
    pairs=some_captions,
    ranks=st.sampled_from([1, 2, 4]),
    micro_batch=st.sampled_from([1, 3]),
    streams=st.integers(1, 6),
    phases=st.integers(1, 3),
    block=st.integers(1, 20),
    start=st.integers(0, 7),
)
def test_any_rank_and_any_resume_draws_the_same_captions_and_each_sample_comes_once(
    base, pairs, ranks, micro_batch, streams, phases, block, start
):
    captions = [CaptionConfig(field, weight) for field, weight in pairs]
    config = config_of(base, captions, streams=streams, phases=phases, shuffle_block=block)
    steps = -(-2 * N // 12)
    (visits, marks, weights), lacks = read(config, range(steps), 12)
    for epoch in range(2):
        assert sorted(visits[epoch * N : (epoch + 1) * N]) == list(range(epoch * N, (epoch + 1) * N))
    fields = {caption.field for caption in captions}
    for visit, mark, weight in zip(visits, marks, weights, strict=True):
        field = chosen(visit, captions)
        assert (mark, weight) == ((marked(visit % N, field), 1.0) if field else (-1.0, 0.0)), (visit, field)
    used = [visit % N for visit, weight in zip(visits, weights, strict=True) if weight]
    assert lacks == sum(not fields <= set(present(n)) for n in used)
    (rest, marks_, weights_), _ = read(config, range(start, steps), 12, ranks, micro_batch)
    assert (rest, marks_, weights_) == (visits[start * 12 :], marks[start * 12 :], weights[start * 12 :])


def test_workers_change_nothing(base):
    config = config_of(base, EVEN)
    assert read(config, range(6), 12) == read(config, range(6), 12, ranks=2, micro_batch=3, workers=2)


def test_the_shares_are_the_weights_and_epochs_differ(base):
    config = config_of(base, weighted(txt=1.0, recaption=3.0))
    epochs = 60
    (visits, marks, _), _ = read(config, range(epochs), N)
    both = [(v // N, v % N, m >= 100) for v, m in zip(visits, marks, strict=True) if v % N not in (3, 7, 12, 20, 33)]
    drawn = np.array([recaption for *_, recaption in sorted(both)]).reshape(epochs, -1)
    # 2340 draws: five standard deviations are 0.045. Of one sample the sixty draws differ, and so do two samples'.
    assert abs(drawn.mean() - 0.75) < 0.045
    assert (abs(drawn.mean(0) - 0.75) < 5 * (0.75 * 0.25 / epochs) ** 0.5).all()
    assert len({row.tobytes() for row in drawn}) == epochs and len({row.tobytes() for row in drawn.T}) > 30


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), draw=st.floats(0, 1, exclude_max=True))
def test_a_caption_is_chosen_in_proportion_to_its_weight(weights, draw):
    ends = np.cumsum(weights) / np.sum(weights)
    found = choose_caption(weights, draw)
    assert draw <= ends[found] + 1e-9 and (found == 0 or draw >= ends[found - 1] - 1e-9)
    assert choose_caption(weights, 0.0) == 0


def test_the_draw_is_the_one_it_always_was_and_moves_no_other(base):
    """A run that goes on must draw the same captions under any later version."""
    draws = Draws(7, Draw.CAPTION)
    assert [int(draws.at(visit).random() * 1000) for visit in (0, 1, 2, 10**10)] == [371, 753, 933, 165]
    one, several = (config_of(base, captions, cond_drop_prob=0.4) for captions in (weighted(txt=1.0), EVEN))
    # Samples that lack txt are bad with txt alone.
    dropped = []
    for config in (one, several):
        (visits, marks, weights), _ = read(config, range(11), 12)
        dropped.append([v for v, m, w in zip(visits, marks, weights, strict=True) if w and m == -1.0])
    assert set(dropped[0]) <= set(dropped[1]) and 40 < len(dropped[0]) < 70
    assert {v % N for v in set(dropped[1]) - set(dropped[0])} <= {3, 20}


def test_one_caption_needs_no_draw_and_reads_no_json(base):
    for field in FIELDS:
        config = config_of(base, weighted(**{field: 0.3}))
        meta = TextMeta.read(config.text)
        stream = MicroBatches(config, find_datasets(config), meta, image_size=8, seed=3, global_batch=4, micro_batch=4)
        assert stream.choices is None
        (_, marks, weights), lacks = read(config, range(4), 11)
        assert sorted(marks) == sorted(marked(n, field) if field in present(n) else -1.0 for n in range(N))
        assert lacks == 0 and weights.count(0.0) == sum(field not in present(n) for n in range(N))
    assert caption_extensions(["txt"]) == {"txt"}


# Where captions lie.

DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"recaption.txt": b"a", "recaption": b"b", "json": b'{"recaption": "c"}'}, b"a"),
        ({"recaption": b"b", "json": b'{"recaption": "c"}'}, b"b"),
        ({"json": b'{"recaption": "caf\\u00e9 \\ud83d\\ude00"}'}, "café 😀".encode()),
        ({"json": '{"recaption": "é"}'.encode("utf-16")}, "é".encode()),
        ({"recaption": b"\xff\xfe\xfd"}, b"\xff\xfe\xfd"),
        ({"json": b'{"recaption": "\\ud800"}'}, b"\xed\xa0\x80"),
        ({"recaption.txt": b""}, b""),
        ({"json": b'{"recaption": ""}'}, b""),
        ({"txt": b"a", "jpg": b"x"}, None),
        ({"json": b'{"recaption": null}'}, None),
        ({"json": b'{"recaption": 3}'}, None),
        ({"json": b'{"recaption": ["a"]}'}, None),
        ({"json": b'{"recaption": {"recaption": "a"}}'}, None),
        ({"json": b'{"Recaption": "a"}'}, None),
        ({"json": b'"recaption"'}, None),
        ({"json": b"NaN"}, None),
        ({"json": b'{"recaption": "a"'}, None),
        ({"json": b'{"recaption": "\xff"}'}, None),
        ({"json": b""}, None),
        ({"json": DEEP}, None),
        ({"json": b'{"n": ' + b"9" * 5000 + b', "recaption": "a"}'}, None),
        ({"json": b'{"recaption": "a"}' + b" " * MAX_JSON}, None),
    ],
)  # fmt: skip
def test_where_a_caption_lies_and_what_hostile_json_is(members, expected):
    assert find_captions(members, ["recaption"]).get("recaption") == expected
    # What is wrong with it costs no other caption.
    assert find_captions(members | {"txt": b"t"}, ["txt", "recaption"])["txt"] == b"t"


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=60), text=st.text(max_size=8))
def test_no_json_makes_the_search_fail(data, text):
    find_captions({"json": data}, ["a", "b"])
    facts = json.dumps({"a": text, "b": [text]}).encode()
    assert find_captions({"json": facts}, ["a", "b"]) == {"a": text.encode("utf-8", "surrogatepass")}


def test_a_file_may_be_named_in_capitals(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"Recaption.TXT": b"x"}), ("b", {"RECAPTION": b"y"})])
    samples = read_shard(tmp_path / "0.tar", caption_extensions(["ReCaption"]))
    assert [find_captions(members, ["ReCaption"]) for _, members in samples] == [
        {"ReCaption": b"x"},
        {"ReCaption": b"y"},
    ]


def test_a_caption_that_is_no_text_leaves_the_draw_to_the_others(tmp_path, base):
    rows = [
        ("0", {"jpg": jpeg(), "txt": "é".encode("latin-1"), "recaption": b"a"}),
        ("1", {"jpg": jpeg(), "txt": b"b", "json": b'{"recaption": "\\ud800"}'}),
        ("2", {"jpg": jpeg(), "txt": b"\xff", "recaption": b"\xfe"}),
        ("3", {"jpg": jpeg(), "txt": b"b", "json": b"{"}),
    ]
    write_shard(tmp_path / "0.tar", rows)
    (shard,) = find_shards(tmp_path)
    for draw in (0.0, 0.3, 0.7, 0.999):
        cursor = ShardCursor(shard, "", needs_caption=True, captions=weighted(txt=1.0, recaption=1.0))
        found = [cursor.read(row, draw) for row in range(4)]
        assert [(raw.chosen, raw.caption) for raw in found[:2]] == [("recaption", b"a"), ("txt", b"b")]
        assert [raw.problem for raw in found] == ["", "", "caption not UTF-8", ""]
        assert [raw.lacks for raw in found if not raw.problem] == [True] * 3


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, PER_SHARD - 1), st.floats(0, 0.999)), min_size=1, max_size=PER_SHARD))
def test_any_rows_with_any_draws_have_the_embeddings_of_their_captions(base, rows):
    """Whichever sidecar is read next, and however many of its samples were passed over."""
    chosen_rows = dict(rows)
    cursor = ShardCursor(find_shards(base / "shards")[1], str(base / "text"), captions=EVEN)
    meta = TextMeta.read(base / "text")
    for row in sorted(chosen_rows):
        n, raw = PER_SHARD + row, cursor.read(row, chosen_rows[row])
        assert raw.chosen in present(n) and not raw.problem
        assert from_bytes(raw.embedding.read(), meta)[0, 0] == marked(n, raw.chosen)
        assert {raw.chosen, *raw.others} == set(present(n))


def test_damage_to_the_embeddings_of_one_caption_changes_no_draw(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    captions = weighted(txt=1.0, recaption=1.0)
    whole, _ = read(config_of(folder, captions), range(4), 11)
    sidecar = folder / "text" / "recaption" / "00002.tar"
    os.truncate(sidecar, 3000)
    damaged, _ = read(config_of(folder, captions), range(4), 11)
    assert damaged[0] == whole[0]
    changed = [(a, b) for a, b in zip(whole[1], damaged[1], strict=True) if a != b]
    assert changed and all(122 <= a < 133 and b == -1.0 for a, b in changed), "recaptions of that shard alone"
    sidecar.unlink()
    assert read(config_of(folder, captions), range(4), 11)[0][0] == whole[0]


def test_prompts_are_the_first_captions_that_samples_have(base):
    config = config_of(base, weighted(recaption=0.1, txt=5.0))
    prompts = stored_prompts(find_datasets(config), TextMeta.read(config.text), N)
    order = ("recaption", "txt")
    first = {n: next((field for field in order if field in present(n)), "") for n in range(N)}
    expected = [(n, field) for n, field in first.items() if field]
    assert [caption for caption, _ in prompts] == [f"{field} of {n}" for n, field in expected]
    assert [embedding[0, 0] for _, embedding in prompts] == [marked(n, field) for n, field in expected]


def test_evaluation_takes_the_caption_that_it_is_told(base):
    shards, meta, digests = find_shards(base / "shards")[3:], TextMeta.read(base / "text"), set()
    for field in FIELDS:
        pictures = EvalSet(shards, 10, 11, str(base / "text"), meta, caption=field)
        digests.add(pictures.contents()[0])
        texts, states = pictures.captions(0, 10), pictures.embeddings(0, 10)
        numbers = [int(text.rpartition(" ")[2]) for text in texts]
        assert texts == [f"{field} of {n}" for n in numbers]
        assert states[:, 0, 0].tolist() == [marked(n, field) for n in numbers]
    assert len(digests) == 3
    assert EvalSet(shards, 10, 11, str(base / "text"), meta).contents()[0] in digests


def test_an_inspection_shows_each_caption(base, tmp_path, capsys):
    out = tmp_path / "report.html"
    inspect(Inspect(str(base / "shards"), str(out), str(base / "text"), samples=0, captions=list(FIELDS)))
    printed, page = capsys.readouterr().out, out.read_text()
    for field, letters, lacking in (("", "8 to 9", 3), (" recaption", "14 to 15", 3), (" alt", "8 to 9", 4)):
        line = next(line for line in printed.splitlines() if line.startswith(f"captions{field}: {letters} "))
        assert line.endswith(f"; {lacking} missing or empty, 0 repeat another")
    assert "bad samples: 1 no embedding" in printed
    assert "<h2>Captions</h2>" in page and "<h2>Captions: recaption</h2>" in page
    assert "<b>recaption</b> <bdi>recaption of 5</bdi>" in page and "<b>alt</b> <i>no caption</i>" in page
    inspect(Inspect(str(base / "shards"), str(tmp_path / "sheet.png"), samples=0, captions=list(FIELDS)))
    capsys.readouterr()
    inspect(Inspect(str(base / "shards"), str(out), samples=0))
    assert "recaption of" not in out.read_text() and "captions: 8 to" in capsys.readouterr().out
