"""Shards that fit badly, read by real loader workers: fewer than workers, one alone, empty ones; never a hang."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.loader.dataset import find_datasets
from data.loader.stream import MicroBatches, micro_batches
from data.storage.shards import find_shards
from data.storage.tars import stats_path, write_shard
from data.text.embeddings import to_bytes
from data.text.meta import TextMeta

TOKENS, DIM, GLOBAL_BATCH = 2, 4, 8


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for a minute waits for ever: the test fails where it stands."""

    def stop(*_) -> None:
        raise TimeoutError("no batch came for a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_dataset(folder: Path, counts: list[int]) -> DataConfig:
    """Shards of so many samples, whose pictures are grey by the sample's index."""
    index = 0
    for shard, count in enumerate(counts):
        images, texts = [], []
        for _ in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (9, 8), (index, index, index)).save(picture, "PNG")
            images.append((f"{index:09d}", {"png": picture.getvalue(), "txt": b"grey"}))
            texts.append((f"{index:09d}", {"npy": to_bytes(np.full((TOKENS, DIM), index, np.float32))}))
            index += 1
        write_shard(folder / f"{shard:05d}.tar", images)
        write_shard(folder / "text" / f"{shard:05d}.tar", texts)
    TextMeta("none", "0", "0", TOKENS, DIM, "float32", "float32", "none").write(folder / "text")
    (folder / "text" / "empty.npy").write_bytes(to_bytes(np.zeros((TOKENS, DIM), np.float32)))
    return DataConfig(shards=str(folder), text=str(folder / "text"), tokens=TOKENS, cond_drop_prob=0.0, crop_shift=0.0)


def sequence(config: DataConfig, samples: int, ranks: int, workers: int) -> list[int]:
    """The visits of two epochs, put together from the ranks; every picture must be the visit's own."""
    datasets, meta = find_datasets(config), TextMeta.read(config.text)
    steps, each = -(-2 * samples // GLOBAL_BATCH), GLOBAL_BATCH // ranks
    found = np.full((steps, ranks, each), -1)
    for rank in range(ranks):
        stream = MicroBatches(
            config, datasets, meta, image_size=8, seed=0, global_batch=GLOBAL_BATCH, micro_batch=each // 2, rank=rank,
            ranks=ranks,
        )  # fmt: skip
        batches = micro_batches(stream, workers, pin_memory=False)
        made = [next(batches) for _ in range(steps * 2)]
        visit = torch.cat([batch.visit for batch in made])
        assert not any(batch.bad for batch in made)
        assert (torch.cat([batch.pixels for batch in made])[:, 0, 4, 4] == visit % samples).all()
        assert (torch.cat([batch.text_emb for batch in made])[:, 0, 0] == visit % samples).all()
        found[:, rank] = visit.reshape(steps, each).numpy()
    return found.reshape(-1)[: 2 * samples].tolist()


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([5, 6], id="more workers than shards"),
        pytest.param([23], id="one shard"),
        pytest.param([1], id="one sample"),
        pytest.param([0, 7, 0, 0, 9, 0], id="empty shards between and around"),
        pytest.param([1] * 12, id="shards of one sample"),
    ],
)
@pytest.mark.parametrize(("ranks", "workers"), [(1, 4), (2, 3), (4, 0)])
def test_every_sample_comes_whatever_the_shards(tmp_path, counts, ranks, workers):
    config, n = write_dataset(tmp_path, counts), sum(counts)
    found = sequence(config, n, ranks, workers)
    assert sorted(found[:n]) == list(range(n)) and sorted(found[n:]) == list(range(n, 2 * n))
    assert found == sequence(config, n, 1, 0)


def test_an_empty_shard_without_counts_is_taken_too(tmp_path):
    config = write_dataset(tmp_path, [4, 0, 3])
    for stats in tmp_path.glob("*_stats.json"):
        stats.unlink()
    assert sorted(sequence(config, 7, 1, 2)[:7]) == list(range(7))


def test_a_dataset_of_empty_shards_is_refused(tmp_path):
    config = write_dataset(tmp_path, [0, 0])
    with pytest.raises(ValueError, match=r"the 2 shards .* hold no samples"):
        find_shards(config.shards)
    assert stats_path(tmp_path / "00000.tar").exists()


def test_more_samples_counted_than_there_are_end_as_bad_samples(tmp_path):
    """A stats file that counts too many samples: the rest are bad samples, and nothing waits for them."""
    config = write_dataset(tmp_path, [5, 6])
    stats_path(tmp_path / "00001.tar").write_text('{"successes": 9}')
    stream = MicroBatches(
        config, find_datasets(config), TextMeta.read(config.text), image_size=8, seed=0, global_batch=GLOBAL_BATCH,
        micro_batch=8,
    )  # fmt: skip
    batches = micro_batches(stream, 3, pin_memory=False)
    # 7 steps are four epochs of 14 positions, of which 3 have no sample.
    made = [next(batches) for _ in range(7)]
    assert [reason for batch in made for _, reason in batch.bad] == ["shard ended early"] * 12
