"""The stored form lowrank: its error, the same bits everywhere, hostile bytes, and all that reads and writes it."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.embed import Embed, embed
from data.inspect import Inspect, inspect
from data.loader.batch import Batch
from data.loader.dataset import find_datasets
from data.loader.prompts import stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.storage.tars import read_shard
from data.text import embedding_job, fidelity, lowrank
from data.text.embeddings import from_bytes, loaded_array, read_empty, read_into, store
from data.text.encoder import TextEncoder
from data.text.fidelity import measure_forms, recommend
from data.text.lowrank import measure_channels, register_channels
from data.text.lowrank_factors import FACTORS, empty_factors, read_factors, used_bytes
from data.text.lowrank_product import LowrankProduct
from data.text.meta import TextMeta
from data.text.some_captions import encode_captions
from data.tiny_t5 import TinyT5, write_tiny_t5
from launch.cost.estimate import _embedding_size
from tests.support.trainings import launch, make_data, metrics
from tests.test_text_modes import SAMPLES, TOKENS, write_shards
from train.checkpoint.identity import describe_text
from train.evaluation.manifest import _text
from train.inputs import Inputs

WIDTH, LENGTH = 256, 9
REASONS = {"embedding not readable", "embedding of other channels than meta.json has"}


def states(captions: int = 24, seed: int = 0) -> np.ndarray:
    """[N, 20, WIDTH] with a padding that changes slowly, a channel that is dead and two that are large."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((captions, 20, WIDTH)) + 3 * np.random.default_rng(1).standard_normal(WIDTH)
    place = np.linspace(0, 1, 20 - LENGTH)[None, :, None]
    begin, end = rng.standard_normal((2, captions, 1, WIDTH))
    found[:, LENGTH:] = begin * (1 - place) + end * place
    found[..., 3] *= 100
    found[..., 4] += 1000
    found[..., 5] = 0.25
    return found.astype(np.float32)


def meta(error: float = 0.01, captions: int = 24) -> TextMeta:
    channels = measure_channels(states(captions), np.full(captions, LENGTH)).to_text()
    return TextMeta("none", "0", "0", 20, WIDTH, "lowrank", "float32", "none", error, channels)


META = meta()
STATES = states(1, seed=2)[0]
GOOD = store(STATES, LENGTH, META)


@pytest.mark.parametrize("error", [0.003, 0.01, 0.1])
@pytest.mark.parametrize("length", [1, LENGTH, 20])
def test_tokens_and_padding_have_the_error_that_is_asked_for(error, length):
    of_error = replace(META, error=error)
    scale = register_channels(META.channels, WIDTH)[1].scale
    data = store(STATES, length, of_error)
    off = (from_bytes(data, of_error) - STATES) / scale
    for rows in (off[:length], off[length:]):
        if len(rows):
            assert 0.3 * error < np.sqrt(np.square(rows).mean()) < 1.1 * error
    assert np.abs(off[:, 3]).max() < 8 * error and np.abs(off[:, 4]).max() < 8 * error, "large channels hide nothing"


def test_padding_of_few_strong_components_keeps_the_error():
    rng, error = np.random.default_rng(0), 0.003
    text = lowrank.Channels(np.zeros((2, 512), np.float32), np.ones(512, np.float32)).to_text()
    smooth = TextMeta("none", "0", "0", 77, 512, "lowrank", "float32", "none", error, text)
    rows = rng.standard_normal((77, 512)).astype(np.float32)
    rows[20:] = 8 * rng.standard_normal((57, 3)) @ rng.standard_normal((3, 512)) + 0.002 * rows[20:]
    off = from_bytes(store(rows, 20, smooth), smooth) - rows
    for part in (off[:20], off[20:]):
        assert np.sqrt(np.square(part).mean()) <= 1.05 * error


def test_a_process_that_is_sent_the_meta_reads_the_embeddings():
    asked = "import pickle, sys; meta, data = pickle.load(sys.stdin.buffer)\n"
    asked += "from data.text.embeddings import from_bytes; print(float(from_bytes(data, meta).sum()))"
    sent = pickle.dumps((META, GOOD))
    shown = subprocess.run([sys.executable, "-c", asked], input=sent, capture_output=True, check=True)
    assert float(shown.stdout) == float(from_bytes(GOOD, META).sum())


def test_what_no_error_can_be_is_refused(tmp_path):
    for bad in (0.0, float("nan"), 1.0, -0.01):
        with pytest.raises(ValueError, match="between 0 and 1"):
            store(STATES, LENGTH, replace(META, error=bad))
        replace(META, error=bad).write(tmp_path)
        with pytest.raises(ValueError, match="between 0 and 1"):
            TextMeta.read(tmp_path)


def test_checkpoints_and_evaluations_keep_no_channels():
    for kept in (describe_text(META), _text(META)):
        assert kept["error"] == 0.01 and len(json.dumps(kept)) < 400
    plain = {name for name in META.entries() if name not in ("error", "channels")}
    exact = replace(META, dtype="float32", error=0.0, channels="")
    assert set(describe_text(exact)) == plain and set(_text(exact)) == plain - {"encoder"}
    assert _text(META)["channels"] != _text(meta(captions=7))["channels"]


def test_few_channels_and_components_of_zeros():
    rng, channels = np.random.default_rng(0), meta_of(8)
    for scale in (0.0, 1e-3, 0.012, 1.0):
        for _ in range(50):
            rows = (scale * rng.standard_normal((5, 8))).astype(np.float32)
            off = from_bytes(store(rows, 2, channels), channels) - rows
            assert np.sqrt(np.square(off).mean()) < 0.02 and np.isfinite(off).all()


def meta_of(dim: int) -> TextMeta:
    text = lowrank.Channels(np.zeros((2, dim), np.float32), np.ones(dim, np.float32)).to_text()
    return TextMeta("none", "0", "0", 5, dim, "lowrank", "float32", "none", 0.01, text)


def test_alike_padding_takes_few_bytes():
    apart = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32)
    sizes = [len(store(rows, LENGTH, META)) for rows in (STATES, apart)]
    assert sizes[0] < 0.75 * sizes[1]
    assert len(store(STATES, LENGTH, replace(META, error=0.1))) < 0.7 * sizes[0] < 0.4 * STATES.nbytes


def factors_of(*stored: bytes, of: TextMeta = META) -> torch.Tensor:
    """The factors [N, bytes] of some captions, behind them what is left from others."""
    found = np.stack([loaded_array(of) for _ in stored])
    found[:] = np.random.default_rng(0).integers(256, size=found.shape[1], dtype=np.uint8)
    for out, data in zip(found, stored, strict=True):
        read_into(out, data, of)
    return torch.from_numpy(found)


def rows_of(factors: torch.Tensor, tokens: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [rows, tokens] int64 and numbers [rows, dim] int64 of a caption's factors [bytes]."""
    rows = factors.numpy()[FACTORS.size : FACTORS.unpack_from(factors.numpy())[3]].reshape(-1, 4 * tokens + dim)
    coefficients = np.ascontiguousarray(rows[:, : 4 * tokens]).view("<f4")
    assert (coefficients == np.rint(coefficients)).all()
    return coefficients.astype(np.int64), rows[:, 4 * tokens :].astype(np.int8).astype(np.int64)


@pytest.mark.parametrize("times", [1, 30, 8000])
def test_the_product_has_the_bits_of_the_sums_of_whole_numbers(times):
    """Which are exact in float64, so that no order of adding, and no device, gives others."""
    known = register_channels(META.channels, WIDTH)[1]
    rows = known.center[0] + times * (STATES - known.center[0])
    data = store(rows, LENGTH, META)
    (factors,) = factors_of(data)
    coefficients, numbers = rows_of(factors, *META.shape)
    largest = (np.abs(coefficients).T @ np.abs(numbers)).max()
    assert (len(numbers) > LENGTH + 2) == (times > 1), "numbers that need more bits have more rows"
    assert (largest > 1 << 24) == (times > 1000) and largest < 1 << 53
    steps, padding = np.float32(FACTORS.unpack_from(factors.numpy())[1:3]), np.arange(20) >= LENGTH
    expected = (coefficients.T @ numbers).astype(np.float32) * (known.scale * steps[padding.astype(int)][:, None])
    expected += known.center[padding.astype(int)]
    found = LowrankProduct(np.zeros(META.shape, np.float32), torch.device("cpu")).states(factors[None])[0].numpy()
    assert found.tobytes() == expected.tobytes() == from_bytes(data, META).tobytes()
    assert np.sqrt(np.square((found - rows) / known.scale).mean()) < 0.011


def test_a_batch_takes_the_bytes_of_its_largest_caption_and_keeps_the_empty_one_exact():
    rough, smooth = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32), STATES.copy()
    smooth[LENGTH:] = smooth[LENGTH]
    stored = [store(rough, LENGTH, META), store(smooth, LENGTH, META), GOOD]
    factors, empty = factors_of(*stored), states(1, seed=5)[0]
    used = [used_bytes(one[None].numpy()) for one in factors]
    assert used[1] < used[2] < used[0]
    factors.numpy()[0, : FACTORS.size] = empty_factors()
    batch = Batch(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), factors, torch.arange(3), torch.ones(3)).copy(False)
    assert batch.text_emb.shape == (3, used[2]) and batch.text_emb.is_contiguous()
    assert used[2] < 0.5 * STATES.nbytes
    product = LowrankProduct(empty, torch.device("cpu"))
    found = product.states(batch.text_emb).numpy()
    assert found[0].tobytes() == empty.tobytes()
    for one, data in zip(found[1:], stored[1:], strict=True):
        assert one.tobytes() == from_bytes(data, META).tobytes()
    dropped = product.states(torch.from_numpy(np.stack([empty_factors()] * 2)))
    assert dropped.numpy().tobytes() == 2 * empty.tobytes(), "all of a batch"


def test_channels_that_the_device_does_not_have_make_no_states():
    register_channels.cache_clear()
    lowrank._known.clear()
    replace(META)
    product = LowrankProduct(np.zeros(META.shape, np.float32), torch.device("cpu"))
    other = meta(captions=5)
    assert product.states(factors_of(GOOD, store(STATES, LENGTH, other))).isfinite().all((1, 2)).tolist() == [1, 0]


def test_the_product_reads_no_number_on_the_host():
    product = LowrankProduct(np.zeros(META.shape, np.float32), torch.device("meta"))
    assert product.states(factors_of(GOOD, GOOD).to("meta")).shape == (2, *META.shape)


def test_the_form_does_not_change():
    path = Path(__file__).parent / "support" / "lowrank.json"
    kept = json.loads(path.read_text())
    meta = TextMeta("none", "0", "0", 6, 16, "lowrank", "float32", "none", 0.01, kept["channels"])
    found = from_bytes(bytes.fromhex(kept["npy"]), meta)
    assert hashlib.sha256(found.astype("<f4").tobytes()).hexdigest() == kept["sha256"]


def test_far_states_and_those_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="too large for lowrank"):
            store(np.full_like(STATES, bad), LENGTH, META)
    with pytest.raises(ValueError, match="times as large as those of other captions"):
        store(STATES * 1e9, LENGTH, META)
    for times in (1e14, 1e35):
        with pytest.raises(ValueError, match="times as large as those of other captions"):
            store(STATES * np.float32(times), LENGTH, META)
    with pytest.raises(ValueError, match="no tokens but padding"):
        measure_channels(states(2), np.zeros(2, int))


def test_embeddings_of_other_channels_are_found_or_refused():
    register_channels.cache_clear()
    other = meta(captions=7)
    data = store(STATES, LENGTH, other)
    assert np.allclose(from_bytes(data, META), STATES, rtol=0, atol=10), "known, so read with its own"
    lowrank._known.clear()
    with pytest.raises(ValueError, match="of other channels"):
        from_bytes(data, META)
    register_channels.cache_clear()
    replace(META)
    for bad in ("A", "!!", "AAAA" * 1024, ""):
        with pytest.raises(ValueError, match="channels"):
            register_channels(bad, WIDTH)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(GOOD)), st.binary(max_size=40), st.integers(0, len(GOOD)))
def test_any_bytes_are_an_embedding_or_bad_for_a_known_reason(start, what, then):
    size = len(GOOD)
    for data in (GOOD[:start] + what, (GOOD[:start] + what + GOOD[start + len(what) :])[:size], GOOD[then:]):
        try:
            found = from_bytes(data, META)
        except ValueError as bad:
            assert str(bad) in REASONS
        else:
            assert np.isfinite(found).all()


def test_no_memory_is_taken_for_what_bytes_claim():
    import pyarrow as pa

    bomb = pa.Codec("zstd").compress(bytes(1 << 28), asbytes=True)
    body = bytearray(GOOD[128:])
    at = lowrank.HEAD.size
    rank, step, size = lowrank.GROUP.unpack_from(body, at)
    forged = body[:at] + lowrank.GROUP.pack(rank, step, len(bomb)) + bomb + body[at + lowrank.GROUP.size + size :]
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match="embedding not readable"):
        read_factors(loaded_array(META), forged, *META.shape)
    assert pa.default_memory_pool().max_memory() - before < 1 << 22


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("lowrank")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=48))
    write_shards(base / "shards")
    make(base, "text")
    return base


def make(base: Path, out: str, **more) -> None:
    given = {"encoder": str(base / "t5"), "tokens": TOKENS, "compute": "float32", "dtype": "lowrank", **more}
    embed(Embed(str(base / "shards"), str(base / out), **given))


def test_data_embed_writes_checks_and_repairs_it(base, tmp_path, capsys):
    meta = TextMeta.read(base / "text")
    assert (meta.dtype, meta.error) == ("lowrank", 0.01) and meta.channels
    encoder = TextEncoder(str(base / "t5"), TOKENS, "float32", torch.device("cpu"))
    assert read_empty(base / "text", meta).tobytes() == encoder([""])[0].tobytes(), "exact"
    stored = dict(read_shard(base / "text" / "00000.tar", {"npy"}))
    assert np.load(io.BytesIO(stored["00003"]["npy"])).dtype == np.uint8
    scale = register_channels(meta.channels, 48)[1].scale
    off = (from_bytes(stored["00003"]["npy"], meta) - encoder(["A picture &amp; <b>9</b> cats"])[0]) / scale
    assert 0 < np.sqrt(np.square(off).mean()) < 0.015
    embed(Embed(str(base / "shards"), str(base / "text"), mode="check"))
    assert "have their embeddings" in capsys.readouterr().out
    # A rerun adds nothing; damage to one embedding is found and mended with the same bytes.
    before = (base / "text" / "00001.tar").read_bytes()
    with tarfile.open(base / "text" / "00001.tar") as tar:
        member = tar.getmembers()[2]
    damaged = bytearray(before)
    damaged[member.offset_data + 300] ^= 1
    (base / "text" / "00001.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match="mode=repair"):
        embed(Embed(str(base / "shards"), str(base / "text"), mode="check"))
    embed(Embed(str(base / "shards"), str(base / "text"), mode="repair"))
    assert "1 captions embedded, 8 kept" in capsys.readouterr().out
    assert (base / "text" / "00001.tar").read_bytes() == before
    embed(Embed(str(base / "shards"), str(base / "text")))
    assert "0 new" in capsys.readouterr().out


def test_a_meta_file_that_another_process_wrote_meanwhile_is_kept(base, monkeypatch):
    out, other, calls = base / "raced", base / "text" / ".." / "t5", list[int]()

    def slow(encoder, captions, batch, renew):
        calls.append(len(list(out.glob("*.claim"))))
        found = encode_captions(encoder, captions, batch, renew)
        replace(TextMeta.read(base / "text"), encoder=str(other)).write(out)  # as one that took the claim for stale
        return found

    monkeypatch.setattr(embedding_job, "encode_captions", slow)
    make(base, "raced")
    assert calls == [1] and TextMeta.read(out).encoder == str(other)


def test_other_forms_keep_the_meta_file_that_they_had(base):
    make(base, "plain", dtype="float16")
    assert set(json.loads((base / "plain" / "meta.json").read_text())) == {
        "encoder", "weights_sha256", "tokenizer_sha256", "tokens", "dim", "dtype", "compute", "cleaning"
    }  # fmt: skip


def test_a_training_reads_it_from_folders_with_channels_of_their_own(base, tmp_path, capsys):
    make(base, "exact", dtype="float32")
    write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "00003.tar").unlink()  # so that other captions are measured
    (tmp_path / "t5").symlink_to(base / "t5")
    make(tmp_path, "text")
    names = (base / "shards", base / "text"), (tmp_path / "shards", tmp_path / "text")
    metas = [TextMeta.read(text) for _, text in names]
    assert metas[0].channels != metas[1].channels and replace(metas[0], encoder="") == replace(metas[1], encoder="")

    def batch(*folders: tuple[Path, Path]) -> torch.Tensor:
        entries = {f"d{i}": {"shards": str(s), "text": str(t), "weight": 1.0} for i, (s, t) in enumerate(folders)}
        from omegaconf import OmegaConf

        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(DataConfig), {"mixture": entries, "cond_drop_prob": 0.0, "streams": 2})
        )
        datasets = find_datasets(config)
        meta = TextMeta.read(datasets[0].text)
        lowrank._known.clear()  # as on a rank that the first one sent the datasets to
        register_channels.cache_clear()
        inputs = Inputs(datasets, meta)
        inputs.to(torch.device("cpu"))
        stream = MicroBatches(config, datasets, meta, image_size=8, seed=0, global_batch=SAMPLES, micro_batch=SAMPLES)
        found = next(micro_batches(stream, 0, pin_memory=False))
        prompts = stored_prompts(datasets, meta, 3)
        assert len(prompts) == 3 and all(emb.shape == meta.shape for _, emb in prompts)
        return inputs.text_emb(found.text_emb)

    coded = batch(*names)
    exact = batch((base / "shards", base / "exact"), (tmp_path / "shards", base / "exact"))
    assert coded.dtype == torch.float32
    assert 0 < (coded - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_the_plan_counts_its_bytes(base):
    make(base, "exact-for-plan", dtype="float32")
    sizes = []
    for text in ("text", "exact-for-plan"):
        (dataset,) = find_datasets(DataConfig(shards=str(base / "shards"), text=str(base / text)))
        sizes.append(_embedding_size(dataset, TOKENS, 48))
    average = np.mean([path.stat().st_size for path in (base / "text").glob("*.tar")]) / 10
    assert sizes[0] == pytest.approx(average, rel=0.2) and sizes[1] == 512 + 3584
    dataset.text = str(base / "text")
    dataset.shards = [replace(dataset.shards[0], count=0), *dataset.shards]
    assert _embedding_size(dataset, TOKENS, 48) == sizes[0], "an empty shard tells nothing"
    dataset.shards = [replace(shard, location=shard.location + "x") for shard in dataset.shards]
    assert _embedding_size(dataset, TOKENS, 48) > 512, "no sidecar"


def test_data_inspect_shows_it(base, tmp_path, capsys):
    found = inspect(Inspect(str(base / "shards"), text=str(base / "text"), out=str(tmp_path / "page.html")))
    assert found.bad == [("00001.tar:00017", "no embedding")]
    page = (tmp_path / "page.html").read_text()
    assert "as many bytes as each caption needs" in page and "lowrank" in page and len(page) < 1e6


def test_fidelity_measures_the_forms_and_recommends_the_smallest_that_fits(base, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "DECODE_SECONDS", 0.01)
    given = {"encoder": str(base / "t5"), "tokens": TOKENS, "compute": "float32", "mode": "fidelity"}
    embed(Embed(str(base / "shards"), **given, error=0.03))
    out = capsys.readouterr().out
    assert "| `int8` |" in out and "| `lowrank error=0.03` |" in out and "for error=0.03: dtype=" in out
    lengths, found = np.full(24, LENGTH), states()
    found[..., 4] -= 1000  # of which float16 keeps steps of half a deviation
    forms = {form.name: form for form in measure_forms(found, lengths, replace(META, dtype="float32"))}
    assert forms["float16"].error < forms["lowrank error=0.005"].error < forms["lowrank error=0.01"].error
    assert forms["int8"].tokens > 0.05, "one large channel takes its steps"
    assert recommend(list(forms.values()), 0.01).name == "lowrank error=0.01"
    assert recommend(list(forms.values()), 0.0011).name in ("float16", "bfloat16")
    assert recommend(list(forms.values()), 1e-9).name == "float16"
    found[-1, 0, 4], told = 1e5, list[str]()  # beyond float16
    left = [form.name for form in measure_forms(found, lengths, replace(META, dtype="float32"), say=told.append)]
    assert "float16" not in left and "bfloat16" in left
    assert len(told) == 1 and told[0].startswith("float16 is left out: ")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"mode": "meta", "dtype": "lowrank"}, "leave out dtype"),
        ({"dtype": "float16", "error": 0.01}, "belongs to dtype=lowrank"),
        ({"error": 0.01}, "belongs to dtype=lowrank"),
        ({"dtype": "lowrank", "error": 0.5}, "must be from 0.003 to 0.3"),
        ({"mode": "fidelity"}, "not with mode=fidelity"),
    ],
)
def test_what_cannot_be_is_refused(base, more, told):
    with pytest.raises(ValueError, match=told):
        embed(Embed(str(base / "shards"), str(base / "refused"), str(base / "t5"), TOKENS, "float32", **more))
    assert not (base / "refused").exists()


def test_another_error_than_that_of_the_folder_is_refused(base):
    with pytest.raises(ValueError, match=r"error 0\.01 there, 0\.02 now"):
        make(base, "text", error=0.02)


@pytest.mark.slow
def test_a_training_of_two_ranks_reads_it(repo, tmp_path):
    data = make_data(tmp_path / "data")
    text = tmp_path / "lowrank"
    embed(Embed(f"{data}/shards", str(text), f"{data}/t5", 16, "float32", "lowrank", error=0.01))
    losses = []
    for name, folder in (("exact", data / "text"), ("stored", text)):
        done = launch(repo, data, tmp_path / name, f"data.text={folder}", ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(line["bad_samples"] == 0 for line in metrics(tmp_path / name))
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] != losses[1]
    resumed = launch(repo, data, tmp_path / "stored", f"data.text={text}", "steps=8", ranks=1)
    assert resumed.returncode == 0 and "embeddings" not in resumed.stdout, resumed.stdout[-2000:]
