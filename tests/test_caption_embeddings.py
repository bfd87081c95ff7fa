"""Embeddings of several captions: a folder for each field, made, checked and mended by itself; what a run keeps."""

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import CaptionConfig, DataConfig, TextConfig
from data.embed import Embed, embed, main
from data.index import Index, index
from data.loader.cursor import ShardCursor
from data.loader.dataset import Dataset, check_captions
from data.loader.stream import MicroBatches, micro_batches
from data.storage.digests import caption_digest
from data.storage.shards import find_shards
from data.storage.tars import read_shard, scan_shard, write_shard
from data.text.distinct import DistinctCaptions
from data.text.encoder import TextEncoder
from data.text.meta import TextMeta, check_sidecars
from data.text.sidecar_check import CHANGED, find_outdated
from data.text.sidecar_record import SidecarRecord, WrongSidecar
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.test_export import NET
from train.checkpoint.identity import DataIdentity, add_missing_digests, check_same_run, data_digest
from train.checkpoint.resume import _comparable
from train.config import Config
from train.inputs import Inputs, find_inputs
from train.summary import describe

TOKENS, SHARDS, PER_SHARD = 8, 3, 5
MEMBERS = {"jpg", "txt", "recaption.txt", "json"}
BOTH = [CaptionConfig("txt", 1.0), CaptionConfig("recaption", 3.0)]


def write_shards(folder: Path) -> Path:
    """Recaptions lie in KEY.recaption.txt, or in KEY.json; sample 4 has none, and that of 8 is no text."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(buffer, "JPEG")
    for shard in range(SHARDS):
        rows = []
        for n in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            members = {"jpg": buffer.getvalue(), "txt": b"caption %d" % n}
            if n % 2:
                members["json"] = json.dumps({"recaption": f"drawn again: {n}"}).encode()
            elif n != 4:
                members["recaption.txt"] = b"\xff" if n == 8 else b"told anew: %d" % n
            rows.append((f"{n:05d}", members))
        write_shard(folder / f"{shard:05d}.tar", rows)
    return folder


def change(folder: Path, shard: int, row: int, **members: bytes | None) -> None:
    """Change members of a sample; the stats file is as img2dataset's, without a digest."""
    path = folder / f"{shard:05d}.tar"
    rows = list(read_shard(path, MEMBERS))
    for name, data in members.items():
        name = name.replace("_", ".")
        rows[row][1].pop(name, None)
        if data is not None:
            rows[row][1][name] = data
    write_shard(path, rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Shards, an encoder, and the embeddings of txt alone and of both captions."""
    base = tmp_path_factory.mktemp("made")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=48))
    write_shards(base / "shards")
    embed(arguments(base, "text"))
    shutil.copytree(base / "text", base / "txt-alone")
    embed(Embed(str(base / "shards"), str(base / "text"), caption="recaption"))
    return base


@pytest.fixture
def base(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def arguments(base: Path, text: str, **more) -> Embed:
    settings = {"encoder": str(base / "t5"), "tokens": TOKENS, "compute": "float32", "dtype": "float32", "batch": 3}
    return Embed(str(base / "shards"), str(base / text), **{**settings, **more})


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The captions that go to the encoder."""
    texts, real = [], TextEncoder.token_ids
    monkeypatch.setattr(TextEncoder, "token_ids", lambda self, given: texts.extend(given) or real(self, given))
    return texts


def test_a_caption_that_is_added_later_is_embedded_alone(made, base, encoded, capsys):
    alone, both = contents(made / "txt-alone"), contents(made / "text")
    assert {name: data for name, data in both.items() if not name.startswith("recaption/")} == alone
    assert {name for name in both if name.startswith("recaption/")} == {
        f"recaption/{shard:05d}{end}" for shard in range(SHARDS) for end in (".tar", "_stats.json")
    }
    shutil.rmtree(base / "text" / "recaption")
    embed(Embed(str(base / "shards"), str(base / "text"), caption="recaption"))
    assert len(encoded) == 13 and all(text.startswith(("drawn again", "told anew")) for text in encoded)
    assert contents(base / "text") == both
    said = capsys.readouterr().out
    assert "1 samples have no caption recaption and so no such embedding; the training takes another caption" in said
    assert "1 captions are not UTF-8 (00001:00008)" in said
    embed(Embed(str(base / "shards"), str(base / "text"), caption="recaption"))
    embed(Embed(str(base / "shards"), str(base / "text")))
    assert len(encoded) == 13 and contents(base / "text") == both
    # In the other order: the recaptions first.
    embed(arguments(base, "other", caption="recaption", batch=64, encoder=str(made / "t5")))
    embed(Embed(str(base / "shards"), str(base / "other"), batch=3))
    assert contents(base / "other") == both


def test_what_is_stored_are_the_states_of_the_caption_and_its_digest(made):
    encoder = TextEncoder(str(made / "t5"), TOKENS, "float32", torch.device("cpu"))
    sidecar = made / "text" / "recaption" / "00000.tar"
    rows = dict(read_shard(sidecar, {"npy"}))
    texts = {"00000": "told anew: 0", "00001": "drawn again: 1", "00002": "told anew: 2", "00003": "drawn again: 3"}
    assert list(rows) == list(texts)
    for key, text in texts.items():
        np.testing.assert_array_equal(np.load(io.BytesIO(rows[key]["npy"])), encoder([text])[0])
    record = SidecarRecord.read(str(sidecar))
    assert record.digests == [caption_digest(key, text.encode()) for key, text in texts.items()]
    digests = scan_shard(made / "shards" / "00000.tar", ["txt", "recaption"]).digests
    assert record.source == digests["recaption"] != digests["txt"]


@pytest.mark.parametrize("place", ["member", "json"])
def test_a_changed_recaption_is_seen_and_embedded_alone(base, encoded, capsys, place):
    text, before = base / "text", contents(base / "text")
    edits = {"recaption_txt": b"changed"} if place == "member" else {"json": b'{"recaption": "changed"}'}
    change(base / "shards", 0, 2 if place == "member" else 1, **edits)
    embed(Embed(str(base / "shards"), str(text), mode="check"))
    with pytest.raises(ValueError, match=r"1 of 3 sidecars in '.*recaption' are not right, 12 of 13 captions"):
        embed(Embed(str(base / "shards"), str(text), mode="check", caption="recaption"))
    assert "00000.tar: 1 stale (first: 0000" in capsys.readouterr().out
    embed(Embed(str(base / "shards"), str(text)))
    assert contents(text) == before and encoded == []
    # Told by the stats files and the captions, without a look at an embedding.
    shards, sidecars = find_shards(base / "shards"), str(text / "recaption")
    assert find_outdated(shards, sidecars, "recaption") == ({"00000.tar": CHANGED}, {})
    embed(Embed(str(base / "shards"), str(text), caption="recaption"))
    assert encoded == ["changed"] and "1 captions embedded, 3 kept" in capsys.readouterr().out
    embed(Embed(str(base / "shards"), str(text), mode="check", caption="recaption"))
    changed = {name for name, data in contents(text).items() if before[name] != data}
    assert changed == {"recaption/00000.tar", "recaption/00000_stats.json"}


def test_a_caption_that_moves_to_another_place_is_the_same(base, encoded):
    change(base / "shards", 0, 2, recaption_txt=None, json=b'{"recaption": "told anew: 2"}')
    embed(Embed(str(base / "shards"), str(base / "text"), mode="check", caption="recaption"))
    embed(Embed(str(base / "shards"), str(base / "text"), caption="recaption"))
    assert encoded == []


def test_damage_is_found_and_mended_where_it_is(base, made, encoded, capsys):
    text = base / "text"
    sidecar = text / "recaption" / "00001.tar"
    raw = bytearray(sidecar.read_bytes())
    raw[raw.index(b"NUMPY") + 200] ^= 1
    sidecar.write_bytes(raw)
    (text / "recaption" / "00002.tar").unlink()
    embed(Embed(str(base / "shards"), str(text), mode="check"))
    with pytest.raises(ValueError, match="2 of 3 sidecars"):
        embed(Embed(str(base / "shards"), str(text), mode="check", caption="recaption"))
    said = capsys.readouterr().out
    assert "00001.tar: 1 damaged (first: 00005)" in said and "00002.tar: 5 missing" in said
    embed(Embed(str(base / "shards"), str(text), mode="repair"))
    assert encoded == []
    embed(Embed(str(base / "shards"), str(text), mode="repair", caption="recaption"))
    assert len(encoded) == 6 and {"drawn again: 5", "told anew: 10"} <= set(encoded)
    assert contents(text) == contents(made / "text")


def test_a_field_that_no_sample_has_is_told_when_it_is_embedded_and_refused_in_a_training(base, encoded, capsys):
    embed(Embed(str(base / "shards"), str(base / "text"), caption="recation"))
    assert encoded == [] and "15 samples have no caption recation" in capsys.readouterr().out
    datasets = [Dataset(find_shards(base / "shards"), "", captions=[*BOTH, CaptionConfig("recation")])]
    with pytest.raises(ValueError, match=r"none of 15 samples .* has a caption recation, .* is the name right\?"):
        check_captions(datasets)
    for mode in ("stored", "online"):
        with pytest.raises(ValueError, match="has a caption recation"):
            inputs(base, mode, captions=[CaptionConfig("recation")])
    # Of a mixture one dataset may have it alone; and what cannot be read is for others to tell.
    change(base / "shards", 1, 4, recation=b"x")
    check_captions(datasets)
    write_shard(base / "empty" / "0.tar", [("a", {"txt": b"a"})])
    without = Dataset(find_shards(base / "empty"), "", captions=datasets[0].captions)
    check_captions([without, *datasets])
    with pytest.raises(ValueError, match="none of 1 samples"):
        check_captions([without])
    (base / "empty" / "0.tar").write_bytes(b"")
    check_captions([without])


@pytest.mark.parametrize("field", ["json", "a.b", "../text", "", "TXT", "a b", "é"])
def test_a_field_that_cannot_be_is_refused_in_one_line(base, capsys, field):
    with pytest.raises(SystemExit) as ended:
        main([f"shards={base / 'shards'}", f"out={base / 'text'}", f"caption={field}"])
    assert ended.value.code == 2 and f"'{field}' cannot name a caption" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot name a caption"):
        DataConfig(captions=[CaptionConfig(field)])


def test_a_training_without_the_embeddings_of_a_caption_is_refused_with_the_command(made):
    shards, alone = find_shards(made / "shards"), made / "txt-alone"
    check_sidecars(shards, alone, 0, 0)
    check_sidecars(shards, made / "text", 0, 0, ["txt", "recaption"])
    command = f"`python -m data.embed shards={made / 'shards'} out={alone} caption=recaption`"
    with pytest.raises(ValueError) as error:
        check_sidecars(shards, alone, 0, 0, ["txt", "recaption"])
    assert f"3 of 3 shards have no embeddings in '{alone}/recaption' (first: 00000.tar)" in str(error.value)
    assert command in str(error.value)


def test_other_recaptions_are_refused_before_a_training_and_when_they_are_read(base):
    text = base / "text"
    change(base / "shards", 1, 0, json=b'{"recaption": "changed"}')
    shards = find_shards(base / "shards")
    check_sidecars(shards, text, 0, 0, ["txt", "recaption"])  # nothing tells yet
    cursor = ShardCursor(shards[1], str(text), captions=BOTH)
    with pytest.raises(WrongSidecar, match=r"recaption/00001.tar' has no embedding of the caption of 00005"):
        cursor.read(0, 0.999)
    assert ShardCursor(shards[1], str(text), captions=BOTH).read(0, 0.0).problem == ""
    index(Index(str(base / "shards"), captions=["recaption"], workers=1))
    with pytest.raises(WrongSidecar) as error:
        check_sidecars(find_shards(base / "shards"), text, 0, 0, ["txt", "recaption"])
    assert "of other captions than 1 of 3 shards hold (first: 00001.tar)" in str(error.value)
    assert f"out={text} caption=recaption`" in str(error.value)
    check_sidecars(find_shards(base / "shards"), text, 0, 0)


def test_an_index_has_the_digests_that_it_is_asked_for_and_is_else_as_before(base):
    index(Index(str(base / "shards"), workers=1))
    plain = json.loads((base / "shards" / "index.json").read_text())
    assert all(set(entry) == {"shard", "samples", "bytes", "digest"} for entry in plain["shards"])
    index(Index(str(base / "shards"), captions=["recaption"], workers=2))
    asked = json.loads((base / "shards" / "index.json").read_text())
    assert [{k: v for k, v in e.items() if k != "caption_digests"} for e in asked["shards"]] == plain["shards"]
    for shard in find_shards(base / "shards"):
        assert shard.digest_of("recaption") == scan_shard(shard.location, ["recaption"]).digests["recaption"]
        assert shard.digest_of("alt") is None


def data_of(base: Path, captions: list[CaptionConfig]) -> str:
    datasets = [Dataset(find_shards(base / "shards"), "", captions=captions)]
    add_missing_digests(datasets)
    return data_digest(datasets[0])


def test_the_identity_of_the_data_sees_a_changed_recaption_where_it_is_trained_on(base, caplog):
    txt = [CaptionConfig()]
    alone, both = data_of(base, txt), data_of(base, BOTH)
    assert alone != both and alone == data_digest(Dataset(find_shards(base / "shards"), ""))
    assert "run `python -m data.index shards=" in caplog.text and "captions=recaption` to make this once" in caplog.text
    index(Index(str(base / "shards"), captions=["recaption"], workers=1))
    caplog.clear()
    assert (data_of(base, txt), data_of(base, BOTH)) == (alone, both) and not caplog.text
    (base / "shards" / "index.json").unlink()
    change(base / "shards", 2, 0, recaption_txt=b"changed")
    assert data_of(base, txt) == alone and data_of(base, BOTH) != both


TEXT = TextMeta("none", "0", "0", 16, 64, "float32", "float32", "if-1")
DATA = DataIdentity([10], ["d" * 32], TEXT)


def manifest_of(captions: list[CaptionConfig] | None) -> dict:
    config = asdict(Config(data=DataConfig(captions=captions or [CaptionConfig()])))
    if captions is None:
        del config["data"]["captions"]
    return json.loads(json.dumps(DATA.entries() | {"config": config}))


def test_captions_and_weights_may_not_change_on_the_way(caplog):
    def goes_on(then: list[CaptionConfig] | None, now: list[CaptionConfig]) -> bool:
        try:
            check_same_run("run", manifest_of(then), asdict(Config(data=DataConfig(captions=now))), DATA)
            return True
        except ValueError as error:
            assert "was trained with data.captions=[{'field': '" in str(error)
            return False

    alone = [CaptionConfig("txt", 1.0)]
    assert goes_on(None, alone) and goes_on(alone, [CaptionConfig("txt", 0.5)]) and goes_on(BOTH, BOTH)
    assert not goes_on(None, BOTH) and not goes_on(BOTH, alone) and not goes_on(BOTH, BOTH[::-1])
    assert not goes_on(BOTH, [BOTH[0], CaptionConfig("recaption", 2.0)])
    assert not goes_on(alone, [CaptionConfig("recaption")])
    # A checkpoint of before is not said to have had other captions.
    before, now = (_comparable(manifest_of(captions)["config"], {}, 1) for captions in (None, alone))
    assert before == now


def inputs(base: Path, mode: str, text: str = "text", captions: list[CaptionConfig] = BOTH) -> tuple[Config, Inputs]:
    data = DataConfig(
        shards=str(base / "shards"), text=str(base / text), captions=captions, streams=2, shuffle_block=4,
        cond_drop_prob=0.2,
    )  # fmt: skip
    model = replace(NET, image_size=8)
    config = Config(data=data, text=TextConfig(mode), model=model, global_batch=8, micro_batch=4)
    return config, find_inputs(config)


def batches(base: Path, mode: str, text: str) -> list[list[torch.Tensor]]:
    config, found = inputs(base, mode, text)
    stream = MicroBatches(
        config.data, found.datasets, found.meta, image_size=8, seed=0, global_batch=4, micro_batch=4
    )  # fmt: skip
    source = micro_batches(stream, 0, pin_memory=False)
    got = [next(source) for _ in range(12)]
    return [[b.visit, b.weight, b.lacks, found.text_emb(b.text_emb).float()] for b in got]


def test_online_gives_what_is_stored(base):
    embed(Embed("", str(base / "meta-alone"), str(base / "t5"), TOKENS, "float32", "float32", mode="meta"))
    stored, online = batches(base, "stored", "text"), batches(base, "online", "meta-alone")
    for expected, found in zip(stored, online, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))
        assert (expected[3] - found[3]).abs().max() < 1e-5
    assert sum(int(b[2]) for b in stored) == 6, "two samples of 15 lack a recaption, in 48 of their visits"


def test_a_dry_run_says_which_captions_are_drawn(base):
    config, found = inputs(base, "stored")
    assert "8 tokens, 20% dropped to the empty one; txt 25.0%, recaption 75.0%" in describe(config, 2, found)
    config.data.captions = [CaptionConfig("txt", 7.0)]
    assert "8 tokens, 20% dropped to the empty one\n" in describe(config, 2, found)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.lists(st.binary(max_size=3), max_size=20), max_size=6))
def test_different_captions_are_counted_exactly_while_they_are_few(parts):
    distinct = DistinctCaptions()
    for part in parts:
        distinct.add(part)
    captions = [caption for part in parts for caption in part]
    repeats = len(captions) - len(set(captions))
    assert distinct.exact and distinct.count == len(set(captions))
    assert distinct.repeats(len(captions)).startswith(f"{repeats} of them (" if repeats else "")


def test_different_captions_are_estimated_where_they_are_many():
    distinct = DistinctCaptions(limit=1000)
    for start in range(0, 40_000, 500):
        distinct.add(b"%d" % (n // 2) for n in range(start, start + 500))
    # Five standard errors, of 500 to 1,000 hashes that are held.
    assert not distinct.exact and abs(distinct.count - 20_000) < 5 * 20_000 / 500**0.5
    assert distinct.repeats(40_000).startswith("about ")


def test_a_check_tells_how_many_captions_are_repeated(base, capsys):
    embed(Embed(str(base / "shards"), str(base / "text"), mode="check"))
    assert "equal an earlier one" not in capsys.readouterr().out
    for row in (1, 2, 3):
        change(base / "shards", 1, row, txt=b"caption 0")
    embed(Embed(str(base / "shards"), str(base / "text")))
    embed(Embed(str(base / "shards"), str(base / "text"), mode="check"))
    assert "15 captions: 3 of them (20.0%) equal an earlier one" in capsys.readouterr().out
