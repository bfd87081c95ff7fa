"""The stream: the same batches on any number of ranks and workers, from any step, and bad samples left out."""

import io
import itertools
import json
import os
import re
import signal
import tarfile
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig, DatasetConfig
from data.embed import Embed, embed
from data.images import preprocess
from data.loader.cursor import ShardUnreadable
from data.loader.dataset import find_datasets
from data.loader.draws import Draw, Draws
from data.loader.prompts import prompts_with_low_res, stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.storage.shards import find_shards
from data.storage.tars import read_shard, stats_path, write_shard
from data.text.embeddings import from_bytes, read_empty, to_bytes
from data.text.meta import TextMeta, check_sidecars

TOKENS, DIM = 4, 8


def write_dataset(folder: Path, pictures: list[bytes], per_shard: int) -> DataConfig:
    """Shards of the pictures with captions 'caption N', and embeddings that carry N; the empty one is -1 everywhere."""
    text = folder / "text"
    for shard, start in enumerate(range(0, len(pictures), per_shard)):
        numbers = range(start, min(start + per_shard, len(pictures)))
        write_shard(
            folder / f"{shard:05d}.tar",
            [(f"{n:09d}", {"jpg": pictures[n], "txt": f"caption {n}".encode()}) for n in numbers],
        )
        rows = [(f"{n:09d}", {"npy": to_bytes(np.full((TOKENS, DIM), n, np.float32))}) for n in numbers]
        write_shard(text / f"{shard:05d}.tar", rows)
    TextMeta("none", "0", "0", TOKENS, DIM, "float32", "float32", "none").write(text)
    (text / "empty.npy").write_bytes(to_bytes(np.full((TOKENS, DIM), -1, np.float32)))
    return DataConfig(
        shards=str(folder), text=str(text), tokens=TOKENS, streams=4, phases=2, shuffle_block=8, cond_drop_prob=0.0
    )


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    encoded = []
    for n in range(50):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(n).integers(0, 256, (20 + n % 7, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture
def config(tmp_path, pictures) -> DataConfig:
    return write_dataset(tmp_path, pictures, per_shard=13)


def read(
    config: DataConfig, steps: range, ranks: int = 1, micro_batch: int = 4, workers: int = 0, global_batch: int = 16,
    left_out: tuple[int, ...] = (),
):  # fmt: skip
    """pixels, text_emb, visit of whole steps, with the ranks' parts put together in order; and the bad samples."""
    datasets, meta = find_datasets(config), TextMeta.read(config.text)
    parts, bad = [], []
    for rank in range(ranks):
        data = MicroBatches(
            config, datasets, meta, image_size=8, seed=0, global_batch=global_batch, micro_batch=micro_batch, rank=rank,
            ranks=ranks, step=steps.start, left_out=left_out,
        )  # fmt: skip
        batches = micro_batches(data, workers, pin_memory=False)
        per_step = global_batch // ranks // micro_batch
        got = [next(batches) for _ in range(len(steps) * per_step)]
        bad += [b for batch in got for b in batch.bad]
        parts.append([torch.cat([getattr(b, f) for b in got]) for f in ("pixels", "text_emb", "visit", "weight")])
    each = global_batch // ranks
    join = [torch.cat([p[i].unflatten(0, (len(steps), each)) for p in parts], 1) for i in range(4)]
    return (*join, bad)


@pytest.mark.parametrize(("ranks", "micro_batch", "workers"), [(2, 4, 0), (4, 2, 0), (1, 2, 3), (2, 8, 2), (16, 1, 0)])
def test_ranks_workers_and_micro_batches_change_nothing(config, ranks, micro_batch, workers):
    config.cond_drop_prob = 0.3
    expected, found = read(config, range(9)), read(config, range(9), ranks, micro_batch, workers)
    for a, b in zip(expected[:4], found[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rank", "ranks", "workers"), [(0, 1, 0), (1, 2, 2)])
def test_small_images_are_of_the_same_crops_and_change_nothing_else(config, pictures, rank, ranks, workers):
    datasets, meta, found = find_datasets(config), TextMeta.read(config.text), []
    for low_res_size in (0, 5):
        stream = MicroBatches(
            config, datasets, meta, image_size=8, seed=0, global_batch=16, micro_batch=4, rank=rank, ranks=ranks,
            low_res_size=low_res_size,
        )  # fmt: skip
        batches = micro_batches(stream, workers, pin_memory=False)
        found.append([next(batches) for _ in range(16)])
    crops, seen = Draws(0, Draw.CROP), set()
    for alone, both in zip(*found, strict=True):
        assert alone.low_res is None
        assert both.low_res.shape == (4, 3, 5, 5)
        for name in ("pixels", "text_emb", "visit", "weight"):
            assert torch.equal(getattr(alone, name), getattr(both, name)), name
        for small, visit in zip(both.low_res.numpy(), both.visit.tolist(), strict=True):
            row = visit % 50
            seen.add(row)
            expected = preprocess(pictures[row], 5, config.crop_shift, crops.at(visit))
            assert (small == expected).all(), row
    assert len(seen) > 25


def test_pictures_that_are_smaller_than_the_images_are_counted(tmp_path, pictures):
    config = write_dataset(tmp_path, [*pictures[:15], b"no picture"], per_shard=8)
    sides = [min(Image.open(io.BytesIO(picture)).size) for picture in pictures[:15]]
    found = []
    for image_size in (min(sides), max(sides)):
        stream = MicroBatches(
            config, find_datasets(config), TextMeta.read(config.text), image_size=image_size, seed=0, global_batch=16,
            micro_batch=16,
        )  # fmt: skip
        found.append(int(next(stream.fill(0, 1, [stream.new_buffer()])).copy(False).enlarged))
    assert found == [0, sum(side < max(sides) for side in sides)] != [0, 0]


def test_of_what_cannot_be_read_the_small_image_is_zero_too(tmp_path, pictures):
    config = write_dataset(tmp_path, [*pictures[:7], b"no picture"], per_shard=8)
    stream = MicroBatches(
        config, find_datasets(config), TextMeta.read(config.text), image_size=8, seed=0, global_batch=8, micro_batch=8,
        low_res_size=4,
    )  # fmt: skip
    buffer = stream.new_buffer()
    buffer.low_res.fill_(9)  # of the batch before
    batch = next(stream.fill(0, 1, [buffer]))
    assert [bool(small.any()) for small in batch.low_res] == batch.weight.bool().tolist()
    assert batch.weight.sum() == 7


@pytest.mark.parametrize(("ranks", "micro_batch", "workers"), [(1, 4, 0), (2, 4, 3), (4, 2, 0)])
def test_batches_that_are_left_out_shift_the_later_ones(config, ranks, micro_batch, workers):
    whole, left_out = read(config, range(9)), (7, 2, 3)
    for steps, batches in ((range(6), [0, 1, 4, 5, 6, 8]), (range(2, 5), [4, 5, 6]), (range(5, 6), [8])):
        found = read(config, steps, ranks, micro_batch, workers, left_out=left_out)
        assert all(torch.equal(a[batches], b) for a, b in zip(whole[:4], found[:4], strict=True))
    one = MicroBatches(
        config, find_datasets(config), TextMeta.read(config.text), image_size=8, seed=0, global_batch=16, micro_batch=8,
        left_out=left_out,
    )  # fmt: skip
    assert [one.batch_of(number) for number in (0, 3, 4, 9, 10, 11)] == [0, 1, 4, 6, 8, 8]


@pytest.mark.parametrize("unreadable", ["skip", "fail"])
def test_embeddings_that_vanish_are_bad_samples_or_the_end(config, unreadable):
    # One block over all shards: when the sidecars go, most of them have not been read yet.
    config.streams, config.phases, config.shuffle_block, config.unreadable_shard = 1, 1, 50, unreadable
    data = MicroBatches(
        config, find_datasets(config), TextMeta.read(config.text), image_size=8, seed=0, global_batch=10, micro_batch=1
    )  # fmt: skip
    batches = micro_batches(data, 0, pin_memory=False)
    assert next(batches).bad == []
    for sidecar in Path(config.text).glob("*.tar"):
        sidecar.unlink()
    if unreadable == "fail":
        with pytest.raises(ShardUnreadable, match=r"the embedding of 0000\d.tar:.*data.unreadable_shard=skip"):
            list(itertools.islice(batches, 40))
    else:
        reasons = {reason for batch in itertools.islice(batches, 40) for _, reason in batch.bad}
        assert reasons == {"embeddings unreadable"}


def test_a_mixture_has_its_shares_and_the_samples_of_each(config, tmp_path, pictures):
    other = write_dataset(tmp_path / "other", pictures[:20], per_shard=7)
    config.mixture = {
        "large": DatasetConfig(config.shards, config.text, 3.0),
        "small": DatasetConfig(other.shards, other.text, 1.0),
    }
    whole = read(config, range(8))
    assert torch.equal(whole[2] % 2, read(config, range(8), 2, 4, 2)[2] % 2)
    assert (whole[2] % 2).sum(1).tolist() == [4] * 8, "four of sixteen are of the small one"
    assert whole[4] == []
    number = whole[1][:, :, 0, 0]
    small = number[whole[2] % 2 == 1]
    assert sorted(small[:20].tolist()) == list(range(20)), "each of its samples once an epoch"
    assert set(number[whole[2] % 2 == 0].tolist()) == set(range(50))
    resumed = read(config, range(5, 8), workers=2)
    assert all(torch.equal(a[5:], b) for a, b in zip(whole[:4], resumed[:4], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_goes_on_with_the_very_next_sample(config, workers):
    whole, rest = read(config, range(12)), read(config, range(7, 12), workers=workers)
    for a, b in zip(whole[:4], rest[:4], strict=True):
        assert torch.equal(a[7:], b)


@pytest.mark.parametrize(("ranks", "micro_batch", "workers"), [(1, 4, 3), (4, 2, 0), (2, 8, 1)])
def test_a_resume_with_other_ranks_and_workers_goes_on_with_the_very_next_sample(config, ranks, micro_batch, workers):
    whole, rest = read(config, range(9), 2, 4, 2), read(config, range(5, 9), ranks, micro_batch, workers)
    for a, b in zip(whole[:4], rest[:4], strict=True):
        assert torch.equal(a[5:], b)


def test_killed_workers_cost_no_sample_and_bring_none_twice(config, caplog):
    expected = read(config, range(50))[2].flatten().tolist()
    data = MicroBatches(
        config, find_datasets(config), TextMeta.read(config.text), image_size=8, seed=0, global_batch=16, micro_batch=4
    )  # fmt: skip
    state = torch.get_rng_state()
    others = set(active_children())
    batches, visits = micro_batches(data, 2, pin_memory=False), []
    for number in range(200):
        if number in (0, 61, 120):
            worker = sorted(set(active_children()) - others, key=lambda process: process.pid)[number % 2]
            os.kill(worker.pid, signal.SIGKILL)
        if number == 61:
            worker.join()  # the trainer gets the signal of its death while it does something else, and goes on
        visits += next(batches).visit.tolist()
    assert visits == expected
    assert torch.equal(state, torch.get_rng_state()), "the trainer's own draws stay the same"
    assert caplog.text.count("was killed by SIGKILL before micro batch") == 3
    assert re.search(r"before micro batch \d+ \(step \d+, 0000\d.tar", caplog.text)


def test_the_draws_of_a_visit_are_its_own_and_as_random_as_they_should_be():
    draws = Draws(3, Draw.CROP)
    first = [draws.at(visit).random(8).tolist() for visit in range(500)]
    assert first[::-1] == [draws.at(visit).random(8).tolist() for visit in reversed(range(500))], "in any order"
    assert first[7] != Draws(4, Draw.CROP).at(7).random(8).tolist() != Draws(3, Draw.DROPOUT).at(7).random(8).tolist()
    values = np.array(first)
    assert len(np.unique(values)) == values.size, "visits don't share numbers"
    assert abs(values.mean() - 0.5) < 4 * np.sqrt(1 / 12 / values.size)
    assert (
        np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.2 and np.abs(np.corrcoef(values[:8]) - np.eye(8)).max() < 1
    )


def test_each_sample_comes_once_an_epoch_with_its_own_picture_and_caption(config, pictures):
    pixels, text_emb, visit, weight, bad = read(config, range(25), global_batch=16)
    visit, text_emb = visit.flatten(), text_emb.flatten(0, 1)
    assert sorted(visit.tolist()) == list(range(400)), "8 epochs of 50"
    assert torch.equal(text_emb[:, 0, 0].long(), visit % 50)
    assert weight.min() == 1 and not bad
    # The picture belongs to the caption: the same sample is alike in two epochs, different ones are not.
    pixels = pixels.flatten(0, 1).float().flatten(1)
    first = {int(v) % 50: p for v, p in zip(visit[:50], pixels[:50], strict=True)}
    again = {int(v) % 50: p for v, p in zip(visit[50:100], pixels[50:100], strict=True)}
    same = np.mean([(first[n] - again[n]).abs().mean() for n in range(50)])
    other = np.mean([(first[n] - again[(n + 1) % 50]).abs().mean() for n in range(50)])
    assert same < 0.6 * other
    assert any(not torch.equal(first[n], again[n]) for n in range(50)), "the crop is drawn anew each epoch"


def test_a_tenth_of_captions_becomes_the_empty_one_anew_each_epoch(config):
    config.cond_drop_prob = 0.1
    _, text_emb, visit, *_ = read(config, range(250))
    dropped = (text_emb == -1).flatten(2).all(-1).flatten()
    assert 0.08 < dropped.float().mean() < 0.12
    by_epoch = torch.zeros(80, 50, dtype=torch.bool)
    by_epoch[visit.flatten() // 50, visit.flatten() % 50] = dropped
    assert by_epoch.any(0).float().mean() > 0.95, "no sample is spared for good"
    assert not by_epoch.all(0).any()


def test_bad_samples_are_left_out_and_named(tmp_path, pictures):
    pictures = list(pictures)
    pictures[7], pictures[20] = b"no picture at all", pictures[20][:200]
    config = write_dataset(tmp_path, pictures, per_shard=13)
    _, _, visit, weight, bad = read(config, range(25))
    assert {int(v) % 50 for v in visit[weight == 0]} == {7, 20}
    assert (weight == 0).sum() == 16, "both in each of 8 epochs"
    assert {name for name, _ in bad} == {"00000.tar:000000007", "00001.tar:000000020"}
    assert {reason for _, reason in bad} == {"not a JPEG or PNG", "truncated image"}


def test_a_truncated_shard_costs_its_own_samples_alone(config, caplog):
    tar = Path(config.shards) / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    _, _, visit, weight, bad = read(config, range(25))
    assert {int(v) % 50 for v in visit[weight == 0]} <= set(range(13, 26))
    assert {reason for _, reason in bad} == {"shard ended early"}
    assert "00001.tar" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "text", "twice"])
def test_a_damaged_sidecar_costs_its_own_samples_alone(config, damage):
    path = Path(config.text) / "00001.tar"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("this is no tar")
    else:
        whole = path.read_bytes()
        first = whole[:1024]  # the first member, header and data: its key comes twice
        path.write_bytes(first + whole)
    _, _, visit, weight, bad = read(config, range(25))
    assert len(bad) > 0 and {int(v) % 50 for v in visit[weight == 0]} <= set(range(13, 26))
    assert {reason for _, reason in bad} == {"no embedding"}


def test_an_embedding_that_is_missing_or_not_finite_is_bad(config):
    path = Path(config.text) / "00000.tar"
    rows = list(read_shard(path, {"npy"}))
    rows[3] = (rows[3][0], {"npy": to_bytes(np.full((TOKENS, DIM), np.nan, np.float32))})
    rows[4] = (rows[4][0], {"npy": to_bytes(np.zeros((TOKENS, DIM + 1), np.float32))})
    del rows[8]
    write_shard(path, rows)
    _, _, visit, weight, bad = read(config, range(25))
    assert {int(v) % 50 for v in visit[weight == 0]} == {3, 4, 8}
    assert {reason for _, reason in bad} == {
        "embedding not finite", "embedding of another shape or dtype", "no embedding",
    }  # fmt: skip


def test_a_pickled_embedding_is_never_loaded(config):
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="embedding not readable"):
        from_bytes(buffer.getvalue(), TextMeta.read(config.text))


def test_counts_come_from_stats_or_from_the_tar(config):
    shards = find_shards(config.shards)
    assert [shard.count for shard in shards] == [13, 13, 13, 11]
    for shard in shards:
        stats_path(Path(shard.location)).unlink()
    assert [shard.count for shard in find_shards(config.shards)] == [13, 13, 13, 11]


def test_a_tar_of_a_folder_is_counted_by_its_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in range(3):
            for extension in ("jpg", "txt"):
                tar.addfile(tarfile.TarInfo(f"./some.folder/{n}.{extension}"))
    assert [shard.count for shard in find_shards(tmp_path)] == [3]


def test_prompts_are_captions_with_their_own_embeddings(config):
    prompts = stored_prompts(find_datasets(config), TextMeta.read(config.text), 5)
    assert [caption for caption, _ in prompts] == [f"caption {n}" for n in (0, 10, 20, 30, 40)]
    assert [emb[0, 0] for _, emb in prompts] == [0, 10, 20, 30, 40]


def test_prompts_for_the_second_stage_come_with_their_images(tmp_path, pictures):
    config = write_dataset(tmp_path, [*pictures[:6], b"no picture", *pictures[7:10]], per_shard=4)
    datasets, meta = find_datasets(config), TextMeta.read(config.text)
    prompts = prompts_with_low_res(datasets, meta, 5, 4, config.images)
    assert [caption for caption, _, _ in prompts] == [f"caption {n}" for n in (0, 2, 4, 8)], "6 cannot be read"
    for (_, emb, image), n in zip(prompts, (0, 2, 4, 8), strict=True):
        assert emb[0, 0] == n
        assert (image == preprocess(pictures[n], 4, 0.0, np.random.default_rng(1))).all()


def test_what_does_not_fit_is_refused_before_training(config, tmp_path):
    shards = find_shards(config.shards)
    with pytest.raises(ValueError, match=r"8 wide .* model.encoder_dim is 4096: set model.encoder_dim=8"):
        check_sidecars(shards, config.text, TOKENS, 4096)
    with pytest.raises(ValueError, match=r"4 tokens, data.tokens is 77"):
        check_sidecars(shards, config.text, 77, DIM)
    with pytest.raises(ValueError, match=r"data\.embed"):
        check_sidecars(shards, tmp_path / "nowhere", TOKENS, DIM)
    (Path(config.text) / "00002.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 shards have no embeddings .*00002.tar"):
        check_sidecars(shards, config.text, TOKENS, DIM)
    with pytest.raises(ValueError, match="no folder"):
        find_shards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no shards"):
        find_shards(tmp_path / "empty")


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory) -> Path:
    from data.tiny_t5 import TinyT5, write_tiny_t5

    folder = tmp_path_factory.mktemp("encoder") / "t5"
    write_tiny_t5(TinyT5(out=str(folder)))
    return folder


def test_embeddings_are_the_encoders_states_padding_included(config, tiny_t5, tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    out = tmp_path / "t5"
    args = Embed(config.shards, str(out), str(tiny_t5), tokens=20, compute="float32", dtype="float32", batch=5)
    embed(args)
    meta = TextMeta.read(out)
    assert (meta.tokens, meta.dim, meta.dtype) == (20, 64, "float32")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_t5), T5EncoderModel.from_pretrained(tiny_t5)
    for shard in find_shards(config.shards):
        captions = list(read_shard(shard.location, {"txt"}))
        stored = list(read_shard(out / shard.name, {"npy"}))
        assert [key for key, _ in stored] == [key for key, _ in captions]
        for (_, texts), (_, members) in list(zip(captions, stored, strict=True))[:3]:
            check_states(tokenizer, model, texts["txt"].decode(), from_bytes(members["npy"], meta))
    check_states(tokenizer, model, "", read_empty(out, meta))

    # A rerun does only what is missing, and nothing is mixed with what another encoder made.
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    stats_path(out / "00001.tar").unlink()
    embed(args)
    assert {p.name for p in out.glob("*.tar") if p.stat().st_mtime_ns != before[p.name]} == {"00001.tar"}
    with pytest.raises(ValueError, match=r"made otherwise .*tokens 20 there, 21 now"):
        embed(Embed(config.shards, str(out), str(tiny_t5), tokens=21, compute="float32", dtype="float32"))
    assert not list(out.glob("*.part"))


def check_states(tokenizer, model, caption: str, found: np.ndarray) -> None:
    ids = tokenizer(caption, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).last_hidden_state[0].numpy()
    assert np.abs(expected).std() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_meta_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"dim": 3}))
    with pytest.raises(ValueError, match="not a meta file"):
        TextMeta.read(tmp_path)


def test_real_shards_of_img2dataset_are_taken_as_they_are(shared):
    folder = shared / "data" / "fluent"
    if not folder.is_dir():
        pytest.skip(f"no img2dataset shards in {folder}")
    shards = find_shards(folder)
    assert sum(shard.count for shard in shards) == 1563
    for shard in shards[:2]:
        assert len(list(read_shard(shard.location, {"jpg"}))) == shard.count
