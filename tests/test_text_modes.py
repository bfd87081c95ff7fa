"""Where the text states come from changes nothing: stored, online, or IFPipeline; and which captions are dropped."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IFPipeline
from PIL import Image
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data.config import DataConfig, TextConfig
from data.embed import Embed, embed
from data.loader.batch import Batch
from data.loader.prompts import stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.storage.tars import write_shard
from data.text.embeddings import read_empty
from data.text.encoder import load_encoder
from data.text.meta import TextMeta
from data.text.state_cache import StateCache, cache_bytes
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from tests.checkpoints import write_run
from tests.test_export import NET
from train.config import Config
from train.export import Export, export
from train.inputs import Inputs, find_inputs

TOKENS, SAMPLES = 16, 40


def write_shards(folder: Path) -> Path:
    """Four shards; sample 17 has no caption, sample 18 an empty one."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    for shard in range(4):
        rows = []
        for n in range(10 * shard, 10 * shard + 10):
            caption = b"" if n == 18 else f"A picture &amp; <b>{n * n}</b> cats".encode()
            rows.append((f"{n:05d}", {"jpg": buffer.getvalue()} | ({} if n == 17 else {"txt": caption})))
        write_shard(folder / f"{shard:05d}.tar", rows)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("modes")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=48))
    write_shards(base / "shards")
    settings = {"encoder": str(base / "t5"), "tokens": TOKENS, "compute": "float32", "dtype": "float32"}
    embed(Embed(str(base / "shards"), str(base / "text"), **settings))
    embed(Embed("", str(base / "meta-alone"), **settings, mode="meta"))
    return base


def inputs(base: Path, mode: str, drop: float, cache_gb: float = 0.0) -> tuple[Config, Inputs]:
    text = base / ("text" if mode == "stored" else "meta-alone")
    data = DataConfig(shards=str(base / "shards"), text=str(text), streams=4, shuffle_block=5, cond_drop_prob=drop)
    model = UNetConfig(image_size=8, attention_resolutions=[8], att_pool_heads=4)
    config = Config(data=data, text=TextConfig(mode, cache_gb=cache_gb), model=model)
    found = find_inputs(config)
    assert (config.data.tokens, config.model.encoder_dim) == (TOKENS, 48), "as the meta file of the embeddings says"
    return config, found


def batches(base: Path, mode: str, drop: float = 0.3, workers: int = 0, ranks: int = 1, n: int = 20) -> list:
    """(visit, text_emb, weight) of n global batches of 8, and the bad samples."""
    config, found = inputs(base, mode, drop)
    parts, bad = [], set()
    for rank in range(ranks):
        stream = MicroBatches(
            config.data, found.datasets, found.meta, image_size=8, seed=0, global_batch=8, micro_batch=8 // ranks,
            rank=rank, ranks=ranks,
        )  # fmt: skip
        source = micro_batches(stream, workers, pin_memory=False)
        got: list[Batch] = [next(source) for _ in range(n)]
        bad |= {tuple(one) for batch in got for one in batch.bad}
        parts.append([(b.visit, found.text_emb(b.text_emb).float(), b.weight) for b in got])
    return [[torch.cat(pieces) for pieces in zip(*step, strict=True)] for step in zip(*parts, strict=True)], bad


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (1, 2)])
def test_online_gives_what_is_stored(base, workers, ranks):
    stored, without_embedding = batches(base, "stored")
    online, without_caption = batches(base, "online", workers=workers, ranks=ranks)
    for (visit, expected, weight), (visit_, found, weight_) in zip(stored, online, strict=True):
        assert torch.equal(visit, visit_) and torch.equal(weight, weight_)
        assert expected.std() > 0.05
        assert (expected - found).abs().max() < 1e-5
    assert without_embedding == {("00001.tar:00017", "no embedding")}
    assert without_caption == {("00001.tar:00017", "no caption")}


def test_a_cache_gives_the_bits_of_the_encoder_which_runs_in_the_first_epochs_alone(base, monkeypatch):
    monkeypatch.setattr("data.text.state_cache.BLOCK_BYTES", 2**14)  # several, of 5 captions each
    config, found = inputs(base, "online", 0.05, cache_gb=0.001)
    assert found.cache and found.pop_counts() == {"text_cache_share": 0.0}
    stream = MicroBatches(config.data, found.datasets, found.meta, image_size=8, seed=0, global_batch=8, micro_batch=8)
    shares, encoded = [], []
    monkeypatch.setattr(
        found.encoder, "states", lambda ids, states=found.encoder.states: encoded.append(1) or states(ids)
    )
    for batch, _ in zip(micro_batches(stream, 0, pin_memory=False), range(25), strict=False):  # five epochs
        expected = found.text_emb(batch.text_emb)
        given, before = found.text_emb(batch.text_emb, batch), len(encoded)
        assert torch.equal(given, expected) and given.dtype == expected.dtype
        given.zero_()  # a batch of its own: what is kept stays
        shares.append(found.pop_counts()["text_cache_share"])
        assert len(encoded) == before
    # 38 captions and the empty one; what the dropout spares for the first time is encoded, with its whole batch.
    assert shares[:4] == [0.0] * 4 and set(shares) == {0.0, 1.0}
    assert shares[-10:] == [1.0] * 10
    assert len(encoded) == 25 + shares.count(0.0)
    kept = found.cache._kept
    assert len(kept) == SAMPLES + 1 and {state.nbytes for state in kept} == {TOKENS * 48 * 4}
    blocks = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in kept}
    assert len(blocks) > 1 and max(blocks.values()) <= 2**14 and sum(blocks.values()) <= 1e6


def test_a_cache_is_counted_as_torch_rounds_its_blocks():
    """Each up to a power of two."""
    assert cache_bytes(41, 3072) == 2**17 and cache_bytes(1, 4096) == 4096
    assert cache_bytes(1, 2**28 + 1) == 2**29, "no caption is divided"
    states = 77 * 4096 * 2
    assert 1 <= cache_bytes(27_000, states) / (27_000 * states) < 1.02


def test_a_batch_with_one_new_caption_is_encoded_whole_and_no_more_is_kept_than_there_is_room_for(base):
    encoder = load_encoder(TextMeta.read(base / "text"))
    ids = torch.from_numpy(encoder.token_ids([f"a picture of {n} cats" for n in range(6)]))
    cache, batches_encoded = StateCache(encoder, captions=4), []
    for rows in ([0, 1], [1, 0], [0, 2], [2, 2], [3, 4], [3, 3], [4, 4], [0, 4]):
        assert torch.equal(cache.states(ids[rows], ids[rows]), encoder.states(ids[rows]))
        batches_encoded.append(cache.pop_share() == 0.0)
    assert batches_encoded == [True, False, True, False, True, False, True, True], "the fifth caption has no room"


def test_a_cache_that_cannot_hold_all_captions_is_refused(base):
    with pytest.raises(ValueError, match=r"text.cache_gb=0.0001 is less than the 0.000131 GB of .* 41 captions"):
        inputs(base, "online", 0.3, cache_gb=0.0001)
    with pytest.raises(ValueError, match=r"text.cache_gb=1 belongs to text.mode=online"):
        TextConfig(cache_gb=1)
    assert inputs(base, "online", 0.3)[1].pop_counts() == {}


def test_a_caption_that_is_not_utf8_is_bad_in_either_mode_and_one_with_a_mark_is_not(base, tmp_path):
    """Whether or not the caption would have been dropped, so that a run may go on in the other mode."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    captions = ["a café".encode("latin-1"), "a cat".encode("utf-16"), b"a cat"]
    rows = [(f"{n}", {"jpg": buffer.getvalue(), "txt": caption}) for n, caption in enumerate(captions)]
    write_shard(tmp_path / "shards" / "0.tar", rows)
    embed(Embed(str(tmp_path / "shards"), str(tmp_path / "text"), str(base / "t5"), TOKENS, "float32", "float32"))
    for mode, reason in (("stored", "no embedding"), ("online", "caption not UTF-8")):
        for drop in (0.0, 0.999):
            data = DataConfig(
                shards=str(tmp_path / "shards"), text=str(tmp_path / "text"), streams=1, cond_drop_prob=drop
            )
            found = find_inputs(Config(data=data, text=TextConfig(mode), model=replace(NET, image_size=8)))
            stream = MicroBatches(
                data, found.datasets, found.meta, image_size=8, seed=0, global_batch=3, micro_batch=3
            )  # fmt: skip
            batch = next(micro_batches(stream, 0, pin_memory=False))
            assert batch.bad == [("0.tar:0", reason)]
        prompts = stored_prompts(found.datasets, found.meta, 3)
        assert [caption for caption, _ in prompts] == ["a cat", "a cat"]
        np.testing.assert_allclose(prompts[0][1], prompts[1][1], atol=1e-5)


def test_prompts_of_a_run_need_no_stored_embeddings(base):
    prompts = []
    for mode in ("stored", "online"):
        _, found = inputs(base, mode, 0.0)
        prompts.append(stored_prompts(found.datasets, found.meta, 6))
    assert len(prompts[0]) == 6
    for (caption, expected), (caption_, found) in zip(*prompts, strict=True):
        assert caption == caption_
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_cannot_be_run_online_is_refused_before_anything_starts(base, tmp_path):
    config, _ = inputs(base, "online", 0.0)
    write_tiny_t5(TinyT5(out=str(tmp_path / "other"), dim=48, seed=1))
    for encoder, message in (("gone", r"the encoder '.*gone' cannot be loaded"), ("other", "is another encoder than")):
        config.text.encoder = str(tmp_path / encoder)
        with pytest.raises(ValueError, match=message):
            find_inputs(config)
    config.text = TextConfig("stored")
    with pytest.raises(ValueError, match=r"4 of 4 shards have no embeddings in .* or set text.mode=online"):
        find_inputs(config)
    config.text, config.model = TextConfig("online"), replace(config.model, encoder_dim=64)
    with pytest.raises(ValueError, match=r"48 wide .* set model.encoder_dim=48"):
        find_inputs(config)


def dropped(base: Path, drop: float, n: int) -> dict[int, bool]:
    """Whether each visit's caption was dropped for the stored empty one; less what has no caption, or an empty one."""
    empty = torch.from_numpy(read_empty(base / "text", TextMeta.read(base / "text")))
    made, _ = batches(base, "stored", drop, n=n)
    return {
        int(visit): torch.equal(emb, empty)
        for visits, embs, _ in made
        for visit, emb in zip(visits, embs, strict=True)
        if int(visit) % SAMPLES not in (17, 18)
    }


def test_dropout_has_its_share_and_is_drawn_anew_each_epoch(base):
    """800 steps of 8: 160 epochs of 40 samples, of which 38 have a caption."""
    found = dropped(base, 0.1, 800)
    table = np.array(
        [[found[epoch * SAMPLES + n] for n in range(SAMPLES) if n not in (17, 18)] for epoch in range(160)]
    )
    draws = table.size
    assert abs(table.mean() - 0.1) < 4 * (0.09 / draws) ** 0.5
    # Independent: a sample dropped in one epoch is no more and no less likely to be in the next, nor is its neighbour.
    for both in (table[1:] & table[:-1], table[:, 1:] & table[:, :-1]):
        assert abs(both.mean() - 0.01) < 4 * (0.0099 / both.size) ** 0.5
    counts = table.sum(0)
    assert counts.min() > 2 and counts.var() < 3 * 160 * 0.09, "no sample is spared, none is favoured"


def test_dropout_is_keyed_by_sample_and_epoch(base, tmp_path):
    """In whichever batch a visit comes, it is dropped or not; a larger rate drops what a smaller one does and more."""
    found, more = dropped(base, 0.3, 50), dropped(base, 0.6, 50)
    assert all(more[visit] for visit, was in found.items() if was)
    assert sum(more.values()) > sum(found.values()) > 0
    config, stored = inputs(base, "stored", 0.3)
    config.data.streams, config.data.shuffle_block = 1, 40
    other = MicroBatches(
        config.data, stored.datasets, stored.meta, image_size=8, seed=0, global_batch=10, micro_batch=10
    )  # fmt: skip
    empty = torch.from_numpy(read_empty(base / "text", stored.meta))
    for batch, _ in zip(micro_batches(other, 0, pin_memory=False), range(30), strict=False):
        for visit, emb in zip(batch.visit.tolist(), batch.text_emb, strict=True):
            assert visit % SAMPLES in (17, 18) or torch.equal(emb, empty) == found[visit]


@pytest.mark.parametrize(("drop", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_none_and_all_can_be_dropped(base, drop, share):
    found = dropped(base, drop, 10)
    assert np.mean(list(found.values())) == share
    for mode in ("stored", "online"):
        made, _ = batches(base, mode, drop, n=5)
        alike = torch.cat([emb for _, emb, _ in made])
        assert (torch.allclose(alike, alike[:1].expand_as(alike), atol=1e-5)) == (drop == 1.0)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_data_embed_online_and_the_exported_pipeline_agree(shared, tmp_path, compute):
    """With the real tokenizer and IF's cleaning; a caption per kind of trouble, one of them beyond 77 tokens."""
    torch.manual_seed(0)
    T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=NET.encoder_dim, d_kv=16, d_ff=64, num_heads=3, num_layers=3,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(tmp_path / "t5")  # fmt: skip
    AutoTokenizer.from_pretrained(shared / "t5_tokenizer").save_pretrained(tmp_path / "t5")
    captions = [
        "a photo of a cat", "", "A <b>Red</b> Circle &amp; http://a.com/b.png", "это кошка", "中文",
        "<pad> </s> <extra_id_0>", "word " * 100, "👩\u200d👧 emoji\x00\x1b[31m", "...", "x" * 1000,
    ]  # fmt: skip
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    rows = [(f"{n:03d}", {"jpg": buffer.getvalue(), "txt": text.encode()}) for n, text in enumerate(captions)]
    write_shard(tmp_path / "shards" / "0.tar", rows)
    settings = {"encoder": str(tmp_path / "t5"), "compute": compute, "dtype": "float32", "batch": 4}
    embed(Embed(str(tmp_path / "shards"), str(tmp_path / "text"), **settings))

    states = {}
    for mode in ("stored", "online"):
        data = DataConfig(
            shards=str(tmp_path / "shards"), text=str(tmp_path / "text"), streams=1, shuffle_block=len(rows),
            cond_drop_prob=0.0,
        )  # fmt: skip
        config = Config(data=data, text=TextConfig(mode), model=replace(NET, image_size=8))
        found = find_inputs(config)
        stream = MicroBatches(
            data, found.datasets, found.meta, image_size=8, seed=0, global_batch=len(rows), micro_batch=len(rows)
        )  # fmt: skip
        batch = next(micro_batches(stream, 0, pin_memory=False))
        assert not batch.bad
        states[mode] = found.text_emb(batch.text_emb).float()[batch.visit.argsort()]

    run = write_run(tmp_path / "run", NET, tmp_path / "text")
    export(Export(str(run), str(tmp_path / "if"), encoder="auto"))
    pipeline = IFPipeline.from_pretrained(tmp_path / "if", torch_dtype=getattr(torch, compute))
    theirs, negative = pipeline.encode_prompt(captions, clean_caption=True)
    states["pipeline"] = theirs.float()
    largest = states["stored"].abs().max()
    assert states["stored"].std() > 0.1 and (states["stored"][0] - states["stored"][3]).abs().max() > 0.1
    # In bfloat16 sums of another order of batches round otherwise; single-precision to its last digits.
    rounding = {"float32": 1e-5, "bfloat16": 2**-6}[compute]
    for name in ("online", "pipeline"):
        assert (states[name] - states["stored"]).abs().max() < rounding * largest, name
    empty = torch.from_numpy(read_empty(tmp_path / "text", TextMeta.read(tmp_path / "text")))
    assert (negative[0].float() - empty).abs().max() < rounding * largest
