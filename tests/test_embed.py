"""data.embed: storage, many processes at once, a second look, and repair."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.embed import DEFAULTS, Embed, embed, main
from data.loader.cursor import ShardCursor
from data.storage.claims import STALE_AFTER, claim
from data.storage.shards import find_shards
from data.storage.tars import read_shard, stats_path, write_shard
from data.text import embedding_job
from data.text.decode import decode_caption
from data.text.embedding_job import open_embeddings, write_sidecars
from data.text.embeddings import encode_states, from_bytes, read_empty, read_into, to_bytes
from data.text.encoder import TextEncoder
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5

CPU = torch.device("cpu")
TOKENS = 12


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    write_tiny_t5(TinyT5(out=str(folder)))
    return folder


def caption(shard: int, row: int) -> bytes:
    return f"caption {row} of shard {shard}".encode()


def write_shards(folder: Path, shards: int, samples: int) -> Path:
    for shard in range(shards):
        rows = [(f"{shard:02d}{row:03d}", {"txt": caption(shard, row), "jpg": b"x"}) for row in range(samples)]
        write_shard(folder / f"{shard:05d}.tar", rows)
    return folder


def arguments(shards: Path, out: Path, t5: Path, **more) -> Embed:
    settings = {"encoder": str(t5), "tokens": TOKENS, "compute": "float32", "dtype": "float32", "batch": 4}
    return Embed(str(shards), str(out), **{**settings, **more})


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def made(t5, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("made")
    write_shards(base / "shards", 4, 9)
    embed(arguments(base / "shards", base / "text", t5))
    return base


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 254)]
)
def test_stored_states_are_within_the_rounding_of_their_dtype(t5, tmp_path, dtype, error):
    shards = write_shards(tmp_path / "shards", 1, 5)
    embed(arguments(shards, tmp_path / "text", t5, dtype=dtype))
    meta = TextMeta.read(tmp_path / "text")
    exact = TextEncoder(str(t5), TOKENS, "float32", CPU)([caption(0, row).decode() for row in range(5)])
    stored = [members["npy"] for _, members in read_shard(tmp_path / "text" / "00000.tar", {"npy"})]
    assert len(stored[0]) == meta.nbytes + 128 or len(stored[0]) == meta.nbytes + 80
    # Floats are rounded relative to each value, int8 to the largest of the token.
    scale = np.abs(exact).max(2, keepdims=True) if dtype == "int8" else np.abs(exact)
    found = np.stack([from_bytes(data, meta) for data in stored])
    assert found.dtype == meta.array_dtype
    assert (np.abs(found - exact) <= error * 1.001 * scale + 1e-7).all()
    assert (np.abs(found - exact).max() > 0) == (error > 0)
    out = np.empty(meta.shape, meta.array_dtype)
    read_into(out, stored[3], meta)
    np.testing.assert_array_equal(out, found[3])
    assert np.abs(read_empty(tmp_path / "text", meta)).std() > 0.05


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_what_is_not_finite_is_neither_stored_nor_read(dtype):
    states = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    meta = TextMeta("none", "0", "0", 3, 8, dtype, "float32", "none")
    for bad in (np.nan, np.inf, -np.inf, -np.nan):
        broken = states.copy()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=f"too large for {dtype}"):
            encode_states(broken, dtype)
    hostile = encode_states(states, dtype).copy()
    spoilt = {"float16": np.inf, "float32": np.nan, "bfloat16": 0xFF81, "int8": -1}[dtype]
    hostile[1, -4 if dtype == "int8" else 2 :] = spoilt  # of int8 the step of a token
    with pytest.raises(ValueError, match="not finite"):
        from_bytes(to_bytes(hostile), meta)


def test_bfloat16_rounds_as_torch_does():
    states = (torch.randn(40, 50) * torch.logspace(-30, 30, 50)).float()
    stored = encode_states(states.numpy(), "bfloat16")
    np.testing.assert_array_equal(stored, states.bfloat16().view(torch.uint16).numpy())


def test_states_too_large_for_the_dtype_name_the_caption(t5, tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(t5, dtype=torch.float32)
    model.encoder.final_layer_norm.weight.data *= 1e6
    model.save_pretrained(tmp_path / "hot")
    AutoTokenizer.from_pretrained(t5).save_pretrained(tmp_path / "hot")
    shards = write_shards(tmp_path / "shards", 1, 3)
    embed(arguments(shards, tmp_path / "large", tmp_path / "hot", dtype="bfloat16"))
    with pytest.raises(ValueError, match="too large for float16"):
        embed(arguments(shards, tmp_path / "small", tmp_path / "hot", dtype="float16"))
    # Found even where the empty caption, which is embedded first, is harmless.
    out = tmp_path / "small"
    (out / "empty.npy").write_bytes(to_bytes(np.zeros((TOKENS, 64), np.float16)))
    with pytest.raises(
        ValueError, match=r"the caption 'caption 0 of shard 0' has .* too large for float16: use dtype="
    ):
        embed(arguments(shards, out, tmp_path / "hot", dtype="float16"))
    assert not list(out.glob("*.tar*"))


def test_the_batch_that_a_caption_is_in_changes_rounding_alone(t5):
    """And a caption's states are those of all tokens: padding is part of them, and not trimmed."""
    encoder = TextEncoder(str(t5), 77, "float32", CPU)
    captions = ["a cat", "a much longer caption of many more words", "", "x" * 500]
    together, alone = encoder(captions), np.concatenate([encoder([text]) for text in captions])
    assert np.abs(together - alone).max() < 2e-6 * np.abs(alone).max()
    padding = alone[0, 8:]
    assert np.abs(padding - padding[:1]).max() > 0.01, "states at the padding differ by their position"
    # Cut to the longest caption, the real tokens would come out the same, but 77 states are what IF is given.
    short = TextEncoder(str(t5), 20, "float32", CPU)(["a cat"])
    assert np.abs(short[0] - alone[0, :20]).max() < 2e-6 * np.abs(alone).max()


def test_a_rerun_asks_nothing_twice_and_refuses_other_settings(copy, t5):
    before = contents(copy / "text")
    embed(Embed(str(copy / "shards"), str(copy / "text")))
    assert contents(copy / "text") == before
    for other, message in (
        ({"tokens": 13}, "tokens 12 there, 13 now"),
        ({"dtype": "int8"}, "dtype float32 there, int8"),
        ({"mode": "mend"}, "mode=mend must be one of embed, meta, check, repair"),
        ({"dtype": "float8"}, "dtype=float8 must be one of"),
        ({"compute": "float16"}, "compute=float16 must be one of"),
        ({"cleaning": "none"}, "cleaning=none must be one of"),
        ({"batch": 0}, "batch=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(arguments(copy / "shards", copy / "text", t5, **other))


def start(shards: Path, out: Path, t5: Path) -> subprocess.Popen:
    args = f"shards={shards} out={out} encoder={t5} tokens={TOKENS} compute=float32 dtype=float32 batch=4".split()
    return subprocess.Popen(
        [sys.executable, "-m", "data.embed", *args], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def test_processes_share_the_shards_and_outlive_a_killed_one(t5, tmp_path):
    shards = write_shards(tmp_path / "shards", 12, 40)
    embed(arguments(shards, tmp_path / "alone", t5))
    out = tmp_path / "together"
    workers = [start(shards, out, t5) for _ in range(3)]
    while not list(out.glob("*.tar.claim")):
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0]
    assert contents(out) == contents(tmp_path / "alone")
    new = sum(int(text.split(", ")[-1].split()[0]) for text in printed[1:])
    assert 0 < new <= 12


def test_what_others_and_earlier_starts_have_done_is_counted(copy, monkeypatch, capsys):
    """The shards' 36 samples, of which one has no caption; another process makes a sidecar meanwhile."""
    shards, text = copy / "shards", copy / "text"
    rows = list(read_shard(shards / "00002.tar", {"txt", "jpg"}))
    del rows[4][1]["txt"]
    write_shard(shards / "00002.tar", rows)
    of_other = {path: path.read_bytes() for path in (text / "00001.tar", stats_path(text / "00001.tar"))}
    for path in of_other:
        path.unlink()
    real = embedding_job.write_sidecar

    def while_another_works(*args):
        for path, data in of_other.items():
            path.write_bytes(data)
        return real(*args)

    monkeypatch.setattr(embedding_job, "write_sidecar", while_another_works)
    monkeypatch.setattr(random.Random, "randrange", lambda self, stop: 1)  # begins with the second that is missing
    capsys.readouterr()
    embed(Embed(str(shards), str(text)))
    line = r"embed: 36 of 36 captions \(100 %\), \S+ (captions/s|s/caption), 18 of them in \d+ s, to "
    assert re.search(line + re.escape(str(text)), capsys.readouterr().err)
    embed(Embed(str(shards), str(text)))
    assert "embed:" not in capsys.readouterr().err, "nothing was to be done"


def test_a_claim_is_of_one_and_passes_on_when_its_holder_is_gone(tmp_path):
    path = tmp_path / "0.tar"
    with claim(path) as held:
        assert claim(path) is None
        held.aside.write_bytes(b"half")
        # A holder on another machine, not heard of for long.
        file = tmp_path / "0.tar.claim"
        file.write_text("elsewhere-1-abc")
        assert claim(path) is None and file.exists()
        os.utime(file, (time.time() - STALE_AFTER - 60,) * 2)
        assert claim(path) is None, "removed, for the next call"
        assert not file.exists() and not held.aside.exists()
        with claim(path) as heir:
            assert heir.is_held() and not held.is_held() and heir.aside != held.aside
            held.renew()
    assert not list(tmp_path.iterdir())


def test_a_process_that_lost_its_claim_makes_the_shard_anew(t5, copy, made, monkeypatch):
    """As when it hung for so long that others took it for dead and removed its claim and what it had written."""
    out, tokenize, lost = copy / "text", TextEncoder.token_ids, []

    def lose_claim(self, texts):
        if texts != [""] and not lost:
            lost.extend([*out.glob("*.tar.claim"), *out.glob("*.tar.*.part")])
            for path in lost:
                path.unlink()
        return tokenize(self, texts)

    for path in (out / "00001.tar", stats_path(out / "00001.tar")):
        path.unlink()
    monkeypatch.setattr(TextEncoder, "token_ids", lose_claim)
    embed(Embed(str(copy / "shards"), str(out), batch=4))
    assert len(lost) == 2 and contents(out) == contents(made / "text")


def test_a_shard_that_goes_meanwhile_is_named_and_the_others_are_done(t5, copy, made):
    shards = find_shards(copy / "shards")
    (copy / "shards" / "00002.tar").unlink()
    encoder, meta = open_embeddings(str(copy / "new"), {"encoder": str(t5), "tokens": TOKENS}, DEFAULTS, [])
    work = write_sidecars(shards, str(copy / "new"), encoder, meta, 4, repair=False)
    assert work.unreadable == {"00002.tar": "No such file or directory"} and work.new == 3
    assert {path.name for path in (copy / "new").glob("*.tar")} == {"00000.tar", "00001.tar", "00003.tar"}


@pytest.mark.parametrize("mode", ["embed", "check", "repair"])
def test_shards_that_cannot_be_read_do_not_stop_the_others(t5, tmp_path, capsys, mode):
    shards = write_shards(tmp_path / "shards", 6, 5)
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2 - 100])
    (shards / "00002.tar").write_bytes(b"")
    (shards / "00003.tar").write_bytes(b"<html>404</html>" * 100)
    (shards / "00004.tar").unlink()
    stats_path(shards / "00004.tar").unlink()
    (shards / "00004.tar").symlink_to("nowhere.tar")
    text = tmp_path / "text"
    args = arguments(shards, text, t5)
    for run in range(2):  # and again, when nothing is left to do
        with pytest.raises(ValueError, match="shards cannot be read") as caught:
            embed(args)
        assert all(f"0000{n}.tar" in str(caught.value) for n in range(1, 5)), caught.value
        assert "mend or remove them" in str(caught.value) and "it was cut" in str(caught.value)
        assert f"2 shards of embeddings, 12 x 64 float32, {0 if run else 2} new" in capsys.readouterr().out
    assert {path.name for path in text.glob("*.tar")} == {"00000.tar", "00005.tar"}
    if mode != "embed":
        with pytest.raises(ValueError, match="shards cannot be read"):
            embed(Embed(str(shards), str(text), mode=mode))
    with pytest.raises(SystemExit) as ended:
        main([f"shards={shards}", f"out={text}", f"mode={mode}"])
    assert ended.value.code == 2


def test_a_rerun_makes_anew_what_changed_and_keeps_the_rest(copy, t5, capsys, monkeypatch):
    """Also for shards of the same names that were packed elsewhere, with or without a digest in their stats files."""
    shards, text = copy / "shards", copy / "text"
    rows = list(read_shard(shards / "00001.tar", {"txt", "jpg"}))
    rows[2][1]["txt"] = b"changed"
    rows.append(("new", {"jpg": b"x", "txt": b"a new one"}))
    write_shard(shards / "00001.tar", rows)
    encoded, real = [], TextEncoder.token_ids
    monkeypatch.setattr(TextEncoder, "token_ids", lambda self, texts: encoded.extend(texts) or real(self, texts))
    before = {path.name: path.stat().st_mtime_ns for path in text.glob("*.tar")}
    for run in range(2):
        embed(Embed(str(shards), str(text)))
        said = capsys.readouterr().out
        assert ("1 shards were packed anew: 2 captions embedded, 8 kept" in said) == (run == 0), said
        assert encoded == ["changed", "a new one"]
    embed(Embed(str(shards), str(text), mode="check"))
    after = {path.name: path.stat().st_mtime_ns for path in text.glob("*.tar")}
    assert {name for name in after if after[name] != before[name]} == {"00001.tar"}

    elsewhere = copy / "elsewhere"
    write_shards(elsewhere, 4, 9)
    for number in (0, 3):
        rows = [(f"{number:02d}{row:03d}", {"txt": b"elsewhere %d" % (row // 2)}) for row in range(9)]
        write_shard(
            elsewhere / f"{number:05d}.tar", [rows[0], *list(read_shard(shards / f"0000{number}.tar", {"txt"}))[1:]]
        )
    for path in elsewhere.glob("*_stats.json"):
        path.write_text('{"successes": 9}')
    capsys.readouterr()
    embed(Embed(str(elsewhere), str(text)))
    # 00001 differs from the one above in its changed caption, and has no new sample.
    assert "3 shards were packed anew: 3 captions embedded, 24 kept" in capsys.readouterr().out
    embed(Embed(str(elsewhere), str(text), mode="check"))
    embed(arguments(elsewhere, copy / "anew", t5))
    assert contents(copy / "anew") == contents(text)


def test_a_sample_without_a_caption_that_comes_or_goes_changes_the_record_alone(copy, capsys):
    shards, text = copy / "shards", copy / "text"
    rows = list(read_shard(shards / "00001.tar", {"txt"}))
    write_shard(shards / "00001.tar", [*rows, ("bare", {"jpg": b"x"})])
    assert "1 of 4 sidecars" in check(copy)
    assert "00001.tar: made when the shard had other samples" in capsys.readouterr().out
    embed(Embed(str(shards), str(text)))
    assert "1 shards were packed anew: 0 captions embedded, 9 kept" in capsys.readouterr().out
    embed(Embed(str(shards), str(text), mode="check"))


def test_cut_sidecars_are_made_anew_by_a_rerun_too(copy, made, capsys):
    text = copy / "text"
    for name in ("00000.tar", "00002.tar"):
        os.truncate(text / name, (text / name).stat().st_size - 9000)
    embed(Embed(str(copy / "shards"), str(text)))
    assert "2 sidecars were damaged" in capsys.readouterr().out
    assert contents(text) == contents(made / "text")


def test_an_index_that_is_older_than_a_shard_is_not_believed(copy):
    from data.index import Index, index

    index(Index(str(copy / "shards"), workers=1))
    embed(Embed(str(copy / "shards"), str(copy / "text")))
    rows = [(key, {"txt": members["txt"].upper()}) for key, members in read_shard(copy / "shards/00000.tar", {"txt"})]
    write_shard(copy / "shards" / "00000.tar", rows)
    with pytest.raises(
        ValueError, match=r"index is out of date: '.*00000\.tar' was written again since: run `python -m data"
    ):
        embed(Embed(str(copy / "shards"), str(copy / "text")))
    index(Index(str(copy / "shards"), workers=1))
    embed(Embed(str(copy / "shards"), str(copy / "text")))
    embed(Embed(str(copy / "shards"), str(copy / "text"), mode="check"))


ENCODED = {
    "utf-8": "é ü".encode(), "with a mark": "\ufeffé ü".encode(), "utf-16": "é ü".encode("utf-16"),
    "utf-16-be": b"\xfe\xff" + "é ü".encode("utf-16-be"), "utf-32": "é ü".encode("utf-32"),
}  # fmt: skip
NOT_TEXT = {"latin-1": "é ü".encode("latin-1"), "bare utf-16": "a cat".encode("utf-16-le"), "cut": "é".encode()[:1]}


def test_captions_are_text_whatever_their_mark_and_others_are_named(t5, tmp_path, capsys):
    assert {decode_caption(data) for data in ENCODED.values()} == {"é ü"}
    assert decode_caption(b"\xef\xbb\xbf") == decode_caption(b"") == ""
    for data in NOT_TEXT.values():
        with pytest.raises(ValueError, match="caption not UTF-8"):
            decode_caption(data)
    rows = [(name, {"jpg": b"x", "txt": data}) for name, data in (ENCODED | NOT_TEXT).items()]
    write_shard(tmp_path / "shards" / "00000.tar", rows)
    text = tmp_path / "text"
    embed(arguments(tmp_path / "shards", text, t5, cleaning="lower-strip"))
    named = "3 captions are not UTF-8 (00000:latin-1, 00000:bare utf-16, 00000:cut) and have no embedding"
    assert named in capsys.readouterr().out
    states = {key: members["npy"] for key, members in read_shard(text / "00000.tar", {"npy"})}
    assert list(states) == list(ENCODED)
    same = [np.load(io.BytesIO(npy)) for npy in states.values()]
    assert all(np.abs(array - same[0]).max() < 1e-5 for array in same)
    embed(Embed(str(tmp_path / "shards"), str(text), mode="check"))
    said = capsys.readouterr().out
    assert named in said and "5 captions in 1 shards have their embeddings" in said
    cursor = ShardCursor(find_shards(tmp_path / "shards")[0], str(text))
    problems = [cursor.read(row).problem for row in range(len(rows))]
    assert problems == [""] * len(ENCODED) + ["no embedding"] * len(NOT_TEXT)


def test_keys_that_are_not_utf8_are_embedded_under_their_bytes(t5, tmp_path, capsys):
    """As an old system's tar leaves them."""
    shards, text = tmp_path / "shards", tmp_path / "text"
    shards.mkdir()
    keys = [f"caf\udce9{number}" for number in range(2)]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(shards / f"{form}.tar", "w", format=form) as tar:
            for key in keys:
                info = tarfile.TarInfo(f"{key}.txt")
                info.size = 6
                tar.addfile(info, io.BytesIO(b"a cafe"))
    embed(arguments(shards, text, t5))
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert [key for key, _ in read_shard(text / f"{form}.tar", {"npy"})] == keys
    embed(Embed(str(shards), str(text), mode="check"))
    (text / f"{tarfile.GNU_FORMAT}.tar").unlink()
    capsys.readouterr()
    with pytest.raises(ValueError, match="mode=repair"):
        embed(Embed(str(shards), str(text), mode="check"))
    assert r"2 missing (first: caf\xe90)" in capsys.readouterr().out
    embed(Embed(str(shards), str(text), mode="repair"))
    embed(Embed(str(shards), str(text), mode="check"))
    cursor = ShardCursor(find_shards(shards)[0], str(text))
    assert [cursor.read(row).name for row in range(2)] == [
        rf"{find_shards(shards)[0].name}:caf\xe9{n}" for n in range(2)
    ]


def check(copy: Path) -> str:
    with pytest.raises(ValueError, match="are not right") as caught:
        embed(Embed(str(copy / "shards"), str(copy / "text"), mode="check"))
    return str(caught.value)


def test_a_check_finds_and_a_repair_mends_only_what_is_wrong(copy, made, t5, capsys, monkeypatch):
    text, shards = copy / "text", copy / "shards"
    embed(Embed(str(shards), str(text), mode="check"))
    assert "36 captions in 4 shards have their embeddings" in capsys.readouterr().out

    # 0: two captions changed, one gone, one new; 1: a flipped bit; 2: no sidecar; a sidecar of no shard.
    rows = [(key, members) for key, members in read_shard(shards / "00000.tar", {"txt", "jpg"})]
    rows[1][1]["txt"], rows[4][1]["txt"] = b"changed", b"changed as well"
    del rows[6]
    rows.append(("new", {"txt": b"a new one"}))
    write_shard(shards / "00000.tar", rows)
    raw = bytearray((text / "00001.tar").read_bytes())
    raw[raw.index(b"NUMPY", 9000) + 200] ^= 1
    (text / "00001.tar").write_bytes(raw)
    (text / "00002.tar").unlink()
    shutil.copy(text / "00003.tar", text / "77777.tar")
    assert "3 of 4 sidecars" in check(copy)
    printed = capsys.readouterr().out
    assert "00000.tar: 1 missing (first: new); 2 stale (first: 00001); 1 extra (first: 00006)" in printed
    assert "00001.tar: 1 damaged (first: 01" in printed
    assert "00002.tar: 9 missing" in printed and "No such file" in printed
    assert "1 sidecars belong to none of these shards" in printed and "77777.tar" in printed

    encoded = []
    real = TextEncoder.token_ids
    monkeypatch.setattr(TextEncoder, "token_ids", lambda self, texts: encoded.extend(texts) or real(self, texts))
    good = (text / "00003.tar").stat().st_mtime_ns
    embed(Embed(str(shards), str(text), mode="repair", batch=4))
    assert len(encoded) == 2 + 1 + 1 + 9, encoded
    assert (text / "00003.tar").stat().st_mtime_ns == good
    embed(Embed(str(shards), str(text), mode="check"))
    embed(arguments(shards, copy / "anew", t5))
    (text / "77777.tar").unlink()
    assert contents(copy / "anew") == contents(text)


@pytest.mark.parametrize("damage", ["cut", "no record", "order", "empty"])
def test_other_damages_are_found_and_mended(copy, made, damage):
    path = copy / "text" / "00001.tar"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no record":
        stats_path(path).write_text(json.dumps({"count": 9, "successes": 9}))
    else:
        stats = json.loads(stats_path(path).read_text())
        hashes, sums = stats["captions_blake2b"], stats["npy_crc32"]
        hashes, sums = hashes[16:32] + hashes[:16] + hashes[32:], sums[8:16] + sums[:8] + sums[16:]
        turned = {"captions_blake2b": hashes, "npy_crc32": sums}
        rows = list(read_shard(path, {"npy"}))
        write_shard(path, [rows[1], rows[0], *rows[2:]], turned)
    check(copy)
    embed(Embed(str(copy / "shards"), str(copy / "text"), mode="repair"))
    assert contents(copy / "text") == contents(made / "text")


def test_embeddings_may_be_made_before_the_images_and_elsewhere(t5, tmp_path):
    captions = tmp_path / "one-disk" / "captions"
    for shard in find_shards(write_shards(tmp_path / "whole", 2, 5)):
        rows = [(key, {"txt": members["txt"]}) for key, members in read_shard(shard.location, {"txt"})]
        write_shard(captions / shard.name, rows)
    text = tmp_path / "another-disk" / "text"
    embed(arguments(captions, text, t5))
    shards = write_shards(tmp_path / "later", 2, 5)
    embed(Embed(str(shards), str(text), mode="check"))
    embed(arguments(shards, tmp_path / "after", t5))
    assert contents(text) == contents(tmp_path / "after")


@pytest.mark.parametrize("text", ["?!... ---", "x" * 1_000_000, "word " * 20_000, "&#xD800;", "\x00\x1b[31m"])
def test_odd_captions_have_finite_states(t5, text):
    states = TextEncoder(str(t5), 77, "float32", CPU)([text, text + "\ud800"])
    assert states.shape == (2, 77, 64) and np.isfinite(states).all() and states.std() > 0.05


def test_the_meta_alone(t5, tmp_path):
    embed(Embed("nowhere", str(tmp_path / "text"), str(t5), mode="meta"))
    meta = TextMeta.read(tmp_path / "text")
    assert (meta.tokens, meta.compute, meta.dtype, meta.cleaning) == (77, "bfloat16", "float16", "if-1")
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"meta.json", "empty.npy"}
    assert read_empty(tmp_path / "text", meta).shape == (77, 64)


def test_captions_that_the_cleaning_leaves_nothing_of_are_named(t5, tmp_path, capsys):
    captions = {"a": "a red circle", "b": "\u4e00\u4e2a\u7ea2\u8272\u7684\u5706", "c": "  "}
    write_shard(tmp_path / "shards" / "00000.tar", [(key, {"txt": text.encode()}) for key, text in captions.items()])
    embed(arguments(tmp_path / "shards", tmp_path / "if-1", t5, cleaning="if-1"))
    said = capsys.readouterr().out
    assert "1 caption is empty after cleaning=if-1 (00000:b)" in said and "cleaning=lower-strip" in said
    embed(arguments(tmp_path / "shards", tmp_path / "lower", t5, cleaning="lower-strip"))
    assert "empty after cleaning" not in capsys.readouterr().out
