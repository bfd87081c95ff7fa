"""The validation loss: its samples, timesteps and noise, what is refused; by two ranks in a training: test_train.py."""

import logging
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data import demo
from data.config import DataConfig, ValidationConfig
from data.embed import Embed, embed
from data.images import preprocess
from data.index import Index, index
from data.loader import held_out
from data.loader.cursor import ShardCursor
from data.loader.dataset import Dataset
from data.loader.held_out import HeldOut
from data.storage.shards import find_shards
from data.storage.tars import read_shard, write_shard
from data.text.embeddings import from_bytes
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.diffusion import Diffusion
from model.super_resolution import enlarge
from tests.checkpoints import random_net
from tests.support.trainings import SMALL, metrics, start
from train.checkpoint.format import complete_checkpoints
from train.compose import compose_config
from train.config import Config
from train.evaluation.validation import draw_noise, timesteps, validation_losses
from train.inputs import find_inputs
from train.summary import describe

SIZE, MICRO_BATCH, CPU = 16, 4, torch.device("cpu")
NET = UNetConfig(
    image_size=SIZE, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[8], num_head_channels=32, encoder_dim=64, encoder_channels=32, att_pool_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """27 scenes in three shards, of which the fourth cannot be read, with embeddings."""
    folder = tmp_path_factory.mktemp("held_out")
    demo.main([f"out={folder / 'shards'}", "samples=27", "shard_size=10", "seed=9"])
    first = folder / "shards" / "00000.tar"
    rows = [(key, dict(members)) for key, members in read_shard(first, {"jpg", "txt"})]
    rows[3][1]["jpg"] = b"no picture"
    write_shard(first, rows)
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 16, "float32", "float32"))
    return folder


def dataset(data: Path) -> Dataset:
    return Dataset(find_shards(data / "shards"), str(data / "text"))


def part(data: Path, samples: int, rank: int = 0, ranks: int = 1, config: DataConfig | None = None) -> HeldOut:
    """A part of the held-out samples, under a training's configuration that crops at random and drops every caption."""
    meta, config = TextMeta.read(data / "text"), config or DataConfig(crop_shift=0.5, cond_drop_prob=1.0)
    return HeldOut(
        config, [dataset(data)], meta, image_size=SIZE, samples=samples, micro_batch=MICRO_BATCH, rank=rank,
        ranks=ranks,
    )  # fmt: skip


def test_the_timesteps_are_the_middles_of_eight_equal_parts():
    assert timesteps(1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert timesteps(8) == list(range(8))
    assert timesteps(2) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_samples_are_spread_over_all_shards_and_the_same_for_any_number_of_ranks(data):
    (alone,) = [list(part(data, 18))]
    visits = torch.cat([batch.visit for batch in alone]).tolist()
    assert visits == [i * 27 // 18 for i in range(18)] + [-1, -1], "taken evenly, and filled up"
    assert [len(part(data, 18, rank, 2)) for rank in range(2)] == [3, 3], "each rank has as many forward passes"
    both = [list(part(data, 18, rank, 2)) for rank in range(2)]
    for number, batch in enumerate(alone):
        other = both[number % 2][number // 2]
        for name in ("pixels", "text_emb", "visit", "weight"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
    beyond = both[1][2]
    assert beyond.visit.tolist() == [-1] * 4 and not beyond.weight.any() and not beyond.bad


def test_small_images_are_of_the_same_central_crops(data):
    meta, given = TextMeta.read(data / "text"), {"image_size": SIZE, "samples": 6, "micro_batch": 3}
    both = list(HeldOut(DataConfig(crop_shift=0.5), [dataset(data)], meta, low_res_size=4, **given))
    alone = list(HeldOut(DataConfig(), [dataset(data)], meta, image_size=4, samples=6, micro_batch=3))
    assert [batch.low_res.tolist() for batch in both] == [batch.pixels.tolist() for batch in alone]
    assert both[0].pixels.shape == (3, 3, SIZE, SIZE) and both[0].low_res.any()


def test_crops_are_central_captions_are_kept_and_bad_samples_have_no_weight(data):
    found, meta = dataset(data), TextMeta.read(data / "text")
    batches = list(part(data, 1000))
    assert sum(int((batch.visit >= 0).sum()) for batch in batches) == 27, "all there are"
    assert [bad for batch in batches for bad in batch.bad] == [("00000.tar:000000003", "not a JPEG or PNG")]
    for batch in batches:
        pixels, text_embs = batch.pixels.numpy(), batch.text_emb.numpy()
        for n, (visit, weight) in enumerate(zip(batch.visit.tolist(), batch.weight.tolist(), strict=True)):
            if visit < 0 or visit == 3:
                assert weight == 0 and not pixels[n].any()
                continue
            shard = found.shards[int(visit) // 10]
            cursor = ShardCursor(shard, str(data / "text"))
            raw = cursor.read(int(visit) % 10)
            central = preprocess(raw.image, SIZE, 0.0, np.random.default_rng(0), DataConfig().images)
            assert weight == 1 and np.array_equal(pixels[n], central)
            assert np.array_equal(text_embs[n], from_bytes(raw.embedding.read(), meta))
            cursor.close()


def test_an_encoder_on_the_rank_gives_the_states_that_are_stored(data):
    config = validated(data, "text.mode=online")
    found = find_inputs(config)
    online = HeldOut(config.data, found.held_out, found.meta, image_size=SIZE, samples=18, micro_batch=MICRO_BATCH)
    for stored, tokens in zip(part(data, 18), online, strict=True):
        assert tokens.text_emb.dtype == torch.int32 and torch.equal(stored.weight, tokens.weight)
        states, good = found.text_emb(tokens.text_emb), stored.weight > 0
        assert (states[good] - stored.text_emb[good]).abs().max() < 1e-5 < stored.text_emb[good].std()


def test_what_is_small_and_sound_is_read_once(data, monkeypatch, caplog):
    opened: list[str] = []

    class Counted(ShardCursor):
        def __init__(self, shard, *rest) -> None:
            opened.append(shard.name)
            super().__init__(shard, *rest)

    monkeypatch.setattr(held_out, "ShardCursor", Counted)
    # Without the fourth: every second one.
    whole = part(data, 13)
    first, again = list(whole), list(whole)
    assert opened == ["00000.tar", "00001.tar", "00002.tar"]
    assert all(a is b for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(held_out, "KEEP_BYTES", 1000)
    large = part(data, 13)
    first, again = list(large), list(large)
    assert len(opened) == 9 and all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    # What cannot be read now may be there the next time.
    monkeypatch.setattr(held_out, "KEEP_BYTES", 2**28)
    with caplog.at_level(logging.WARNING):
        broken = part(data, 27)
        assert [sum(len(batch.bad) for batch in broken) for _ in range(2)] == [1, 1]
    assert len(opened) == 15 and caplog.text.count("00000.tar:000000003 is left out of the validation loss") == 1


def test_the_noise_is_keyed_by_sample_and_timestep_alone():
    noise = draw_noise(torch.tensor([3, 7, -1]), 2, (3, 4, 4))
    assert torch.equal(noise[1], draw_noise(torch.tensor([7]), 2, (3, 4, 4))[0]) and not noise[2].any()
    assert not torch.equal(noise[1], draw_noise(torch.tensor([7]), 1, (3, 4, 4))[0])
    many = draw_noise(torch.arange(500), 0, (3, 4, 4))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def losses(data: Path, **more) -> dict[str, float]:
    return validation_losses(random_net(NET, 1), Diffusion(1000), part(data, 18), lambda text: text, CPU, **more)


def test_the_loss_is_the_mean_over_samples_and_timesteps(data, tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    alone = losses(data)
    # By hand, a sample at a time, without the one that cannot be read.
    net, diffusion, errors = random_net(NET, 1), Diffusion(1000), np.zeros((8, 0))
    for batch in part(data, 18):
        for n in np.flatnonzero(batch.weight.numpy()):
            x_start, of_sample = batch.pixels[n : n + 1].float() / 127.5 - 1, []
            for i, timestep in enumerate((62, 187, 312, 437, 562, 687, 812, 937)):
                t, noise = torch.tensor([timestep]), draw_noise(batch.visit[n : n + 1], i, x_start.shape[1:])
                signal_ = float(diffusion.alphas_cumprod[timestep])
                x_t = signal_**0.5 * x_start + (1 - signal_) ** 0.5 * noise
                eps = net(x_t, t, batch.text_emb[n : n + 1])[:, :3]
                of_sample.append(float((eps - noise).square().mean()))
            errors = np.c_[errors, of_sample]
    assert errors.shape[1] == 17 and alone["validation/bad_samples"] == 1
    for i in range(8):
        assert alone[f"validation/mse_e{i}"] == pytest.approx(errors[i].mean(), rel=1e-5)
    assert alone["validation/mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert alone["validation/loss"] == pytest.approx(alone["validation/mse"] + alone["validation/vb"], rel=1e-5)
    # Asked to stop after a forward, it has no result.
    asked = iter([False] * 9 + [True])
    assert losses(data, stop=lambda: next(asked)) == {} and next(asked, None) is None
    dist.destroy_process_group()


def test_of_the_second_stage_it_is_of_small_images_noised_at_a_quarter_or_as_asked(data, tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    meta, net = TextMeta.read(data / "text"), random_net(replace(NET, low_res_size=4), 1)
    samples = HeldOut(
        DataConfig(), [dataset(data)], meta, image_size=SIZE, samples=5, micro_batch=MICRO_BATCH, low_res_size=4
    )
    diffusion, t = Diffusion(1000), torch.tensor([437])
    for given, aug_t in (({}, torch.tensor([250])), ({"aug_level": 0.5}, torch.tensor([500]))):
        found, errors = validation_losses(net, diffusion, samples, lambda text: text, CPU, **given), []
        for batch in samples:
            for n in np.flatnonzero(batch.weight.numpy()):
                x_start = batch.pixels[n : n + 1].float() / 127.5 - 1
                noise, of_small = (draw_noise(batch.visit[n : n + 1], i, x_start.shape[1:]) for i in (3, 8))
                small = diffusion.q_sample(enlarge(batch.low_res[n : n + 1] / 127.5 - 1, SIZE), aug_t, of_small)
                x_t = diffusion.q_sample(x_start, t, noise)
                eps = net(x_t, t, batch.text_emb[n : n + 1], small, aug_t)[:, :3]
                errors.append(float((eps - noise).square().mean()))
        assert len(errors) == 5
        assert found["validation/mse_e3"] == pytest.approx(np.mean(errors), rel=1e-5)
    dist.destroy_process_group()


def validated(data: Path, *changes: str) -> Config:
    given = [f"data.validation.{name}={data / name}" for name in ("shards", "text")]
    trained = [f"data.{name}={data / name}" for name in ("shards", "text")]
    return compose_config([*SMALL, *trained, *given, "validate_every=3", "data.validation.samples=20", *changes])


def test_what_cannot_be_validated_is_refused_before_the_start(data, tmp_path, caplog):
    with pytest.raises(
        ValueError, match=r"validate_every=3 needs held-out samples: name them in data.validation.shards"
    ):
        compose_config([*SMALL, "validate_every=3"])
    with pytest.raises(ValueError, match=r"data.validation.shards='a' and data.validation.text='' belong together"):
        ValidationConfig(shards="a")
    with pytest.raises(ValueError, match=r"data.validation.shards: no folder '.*gone'"):
        find_inputs(validated(data, f"data.validation.shards={tmp_path / 'gone'}"))
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5"), seed=1))
    other = tmp_path / "text"
    embed(Embed(str(data / "shards"), str(other), str(tmp_path / "t5"), 16, "float32", "float32"))
    with pytest.raises(ValueError, match=r"embeddings in '.*text' were made otherwise than those in"):
        find_inputs(validated(data, f"data.validation.text={other}"))
    # It is not looked at where it is not used.
    found = find_inputs(validated(data, f"data.validation.text={other}", "validate_every=0"))
    assert not found.held_out and not caplog.records
    with caplog.at_level(logging.WARNING):
        found = find_inputs(validated(data))
    assert [d.samples for d in found.held_out] == [27]
    assert "3 of 3 shards of data.validation are shards of the training too (first: " in caplog.text


def test_a_share_held_apart_is_validated_on_and_never_trained_on(data, tmp_path, caplog):
    shutil.copytree(data / "shards", tmp_path / "shards")
    trained = [f"data.shards={tmp_path / 'shards'}", f"data.text={data / 'text'}", "data.validation.share=0.3"]
    config = compose_config([*SMALL, *trained, "validate_every=3", "data.validation.samples=100", "global_batch=8"])
    with pytest.raises(ValueError, match=r"python -m data.index shards=.* validation_share=0.3"):
        find_inputs(config)
    index(Index(str(tmp_path / "shards"), workers=1, validation_share=0.3))
    with caplog.at_level(logging.WARNING):
        found = find_inputs(config)
    assert not caplog.records
    apart, kept = ([d.rows(i).tolist() for d in part for i in range(3)] for part in (found.held_out, found.datasets))
    assert all(sorted([*a, *k]) == list(range(n)) for a, k, n in zip(apart, kept, (10, 10, 7), strict=True))
    held = HeldOut(
        config.data, found.held_out, found.meta, image_size=SIZE, samples=100, micro_batch=MICRO_BATCH
    )  # fmt: skip
    read = sum(int((batch.visit >= 0).sum()) for batch in held)
    assert read == held.samples == sum(map(len, apart)) > 2
    embeddings = torch.cat([batch.text_emb[batch.weight > 0] for batch in held])
    cursors = [ShardCursor(shard, str(data / "text")) for shard in found.datasets[0].shards]
    expected = [raw for cursor, rows in zip(cursors, apart, strict=True) for raw in map(cursor.read, rows)]
    sound = [from_bytes(raw.embedding.read(), found.meta) for raw in expected if raw.image != b"no picture"]
    assert np.array_equal(embeddings.numpy(), np.stack(sound))


def test_shards_of_the_training_are_known_by_their_contents_too(data, tmp_path, caplog):
    demo.main([f"out={tmp_path / 'shards'}", "samples=27", "shard_size=10", "seed=9"])
    embed(Embed(str(tmp_path / "shards"), str(tmp_path / "text"), str(data / "t5"), 16, "float32", "float32"))
    with caplog.at_level(logging.WARNING):
        find_inputs(validated(data, f"data.shards={tmp_path / 'shards'}", f"data.text={tmp_path / 'text'}"))
    assert "3 of 3 shards of data.validation are shards of the training too" in caplog.text


def test_what_it_costs_is_told_before_the_start(data):
    config = validated(data)
    told = describe(config, 2, find_inputs(config))
    # 8 x 20 forwards for each 3 steps of 8 images, whose backward takes twice as long as the forward.
    assert f"20 samples of {data / 'shards'} every 3 steps, at 8 timesteps: 24 forward passes on each rank" in told
    assert f"{8 * 20 / (3 * 3 * 8):.2%} of the training's FLOP" in told
    assert "validation  none: validate_every=0" in describe(replace(config, validate_every=0), 2, None)


@pytest.mark.slow
def test_a_signal_in_a_long_validation_is_answered_soon_and_the_watchdog_lets_it_go_on(repo, data, tmp_path):
    run_dir, hang_seconds = tmp_path / "run", 12
    given = [f"data.validation.{name}={data / name}" for name in ("shards", "text")]
    large = ["model.image_size=64", "model.attention_resolutions=[32]", "model.model_channels=64", "micro_batch=1"]
    often = ["wandb.mode=disabled", "validate_every=1", "steps=100", f"hang_seconds={hang_seconds}"]
    process = start(repo, data, run_dir, *given, *large, *often)
    until = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-3000:]
        time.sleep(0.2)
    # The line of the first step is written after its validation. The second step is short beside its own.
    (line,) = metrics(run_dir)
    assert line["seconds_validate"] > hang_seconds + 2, "longer than the watchdog waits"
    time.sleep(0.3 * line["seconds_validate"])
    asked = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=300)
    assert "the validation of step 2 is broken off, to stop" in out + err and "HANGS" not in err
    assert time.monotonic() - asked < line["seconds_validate"], "not after a whole validation"
    assert [path.name for path in complete_checkpoints(run_dir)] == ["step-00000003"], "saved in the next step"
