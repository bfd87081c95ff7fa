"""The whole path learns by heart: 16 flat pictures and their captions, and each caption gives its own colour back."""

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.embed import Embed, embed
from data.storage.tars import read_shard, write_shard
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.support.trainings import launch
from train import sample

SIZE = 8
# Colours in 0 to 255, far from each other.
COLOURS = list(product((26, 128, 230), (26, 128, 230), (26, 230)))[:16]
RECIPE = f"""
    model.image_size={SIZE} model.channel_mult=[1,2] model.attention_resolutions=[4]
    steps=900 global_batch=32 micro_batch=32 save_every=900 log_every=50 ema_decay=0.98 optim.warmup_steps=30
    optim.lr_peak=1e-3 data.streams=1 sample.every=0 wandb.mode=disabled
""".split()


def png(colour: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    (folder / "shards").mkdir()
    # The tiny T5 knows no meanings. A caption of one repeated letter has states that differ from those of all others.
    captions = [chr(ord("a") + i) * 7 for i in range(len(COLOURS))]
    samples = [
        (f"{i:09d}", {"png": png(colour), "txt": caption.encode(), "json": b"{}"})
        for i, (colour, caption) in enumerate(zip(COLOURS, captions, strict=True))
    ]
    write_shard(folder / "shards" / "00000.tar", samples)
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 8, "float32", "float32"))
    return folder


@pytest.mark.slow
def test_each_caption_gives_its_own_picture_back(repo, data, tmp_path):
    run = tmp_path / "run"
    done = launch(repo, data, run, *RECIPE)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_shard(str(next((data / "text").glob("*.tar"))), {"npy"})
    states = [np.load(io.BytesIO(members["npy"])) for _, members in records]
    np.save(tmp_path / "states.npy", np.stack(states))
    sample.main([
        f"checkpoint={run}", f"embeddings={tmp_path / 'states.npy'}", "n=1", "guidance_scale=4", "steps=50",
        f"out={tmp_path / 'drawn'}",
    ])  # fmt: skip
    drawn = np.stack([
        np.asarray(Image.open(file), np.float64) for file in sorted((tmp_path / "drawn").glob("[0-9]*.png"))
    ])  # fmt: skip
    assert len(drawn) == len(COLOURS)
    distances = np.square(drawn[:, None] - np.array(COLOURS)[:, None, None]).mean((2, 3, 4))
    right = distances.argmin(1) == np.arange(len(COLOURS))
    off = np.abs(drawn.mean((1, 2)) - np.array(COLOURS)).max(1) / 255
    assert right.sum() >= 15, f"{right.sum()} of 16 captions give their own colour; off by {np.round(np.sort(off), 3)}"
    assert (off <= 0.1).sum() >= 15, f"mean colours are off by {np.round(np.sort(off), 3)} of the whole range"
