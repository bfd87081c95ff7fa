"""Checkpoints by themselves: cut anew for other ranks and other optimizers, and damage of every kind found."""

import json
import random
import threading
import time
from dataclasses import asdict
from pathlib import Path

import bitsandbytes
import psutil
import pytest
import torch

from data.text.meta import TextMeta
from tests.chaos import damage, fault_of
from tests.checkpoints import write_checkpoint, write_manifest
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import MANIFEST, complete_checkpoints
from train.checkpoint.reader import CheckpointReader
from train.config import Config
from train.engine import Engine

PARAMETERS = {"a.weight": [100, 70], "a.bias": [9001], "b": [40_000]}
TOTAL = 7000 + 9001 + 40_000


def adamw(name: str, parts: list[torch.Tensor]) -> list[dict]:
    """The state of an optimizer on each part after three steps."""
    kind = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "adamw": torch.optim.AdamW}[name]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(TOTAL, generator=generator) for _ in range(3)]
    states, start = [], 0
    for part in parts:
        parameter = torch.nn.Parameter(part)
        optimizer = kind([parameter], lr=1e-3)
        for gradient in gradients:
            own = gradient[start : start + len(part)]
            parameter.grad = torch.cat([own, torch.zeros(len(part) - len(own))])
            optimizer.step()
        start += len(part)
        states.append({f"moments.{k}": torch.as_tensor(v) for k, v in optimizer.state[parameter].items()})
    return states


def write(folder: Path, ranks: int, flat: torch.Tensor, states: list[dict]) -> Path:
    """A checkpoint as the trainer leaves it."""
    parts = [{"master": part, "ema": part + 1, **state} for part, state in zip(cut(flat, ranks), states, strict=True)]
    text = TextMeta("t5", "", "", 16, 64, "float16", "float32", "if-1")
    return write_checkpoint(folder, parts, PARAMETERS, step=3, config=asdict(Config()), text=asdict(text))


def cut(flat: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """As DeepSpeed does."""
    size = 2 * -(-len(flat) // (2 * ranks))
    padded = torch.cat([flat, torch.zeros(size * ranks - len(flat))])
    return [padded[rank * size : (rank + 1) * size].clone() for rank in range(ranks)]


@pytest.fixture(scope="module")
def flat() -> torch.Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(0))


def step_of(values: torch.Tensor, moments: dict, which: int) -> torch.Tensor:
    """The distance between the neighbouring 8-bit numbers around each value."""
    code, scale = moments[f"qmap{which}"], moments[f"absmax{which}"].repeat_interleave(256)[: len(values)]
    at = torch.searchsorted(code, values / scale).clamp(1, len(code) - 1)
    return (code[at] - code[at - 1]) * scale


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2), (2, 5)])
@pytest.mark.parametrize("kind", ["adamw8bit", "adamw"])
def test_other_ranks_get_the_same_masters_and_the_moments_within_a_rounding(tmp_path, flat, before, after, kind):
    parts = CheckpointReader(write(tmp_path / "c", before, flat, adamw(kind, cut(flat, before))), before)
    size = len(cut(flat, after)[0])
    whole = parts.moments(0, before * parts.size)
    optimizer = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "adamw": torch.optim.AdamW}[kind]
    engine = Engine(None, None, optimizer([torch.nn.Parameter(torch.zeros(size))]))
    for rank, expected in enumerate(cut(flat, after)):
        here = slice(rank * size, (rank + 1) * size)
        assert torch.equal(parts.read("master", here.start, here.stop), expected)
        first, second, step = parts.moments(here.start, here.stop)
        held = min(here.stop, TOTAL) - here.start
        assert step == 3 and first[:held].abs().max() > 0.1
        for moment, all_of_it in ((first, whole[0]), (second, whole[1])):
            assert torch.equal(moment[:held], all_of_it[here][:held])
        kept = engine.as_moments(first, second, step)
        assert engine.fits(kept)
        if kind == "adamw":
            assert torch.equal(kept["exp_avg"], first) and torch.equal(kept["exp_avg_sq"], second)
            continue
        for which, moment in ((1, first), (2, second)):
            again = kept[f"qmap{which}"][kept[f"state{which}"].int()]
            again *= kept[f"absmax{which}"].repeat_interleave(256)[: len(moment)]
            assert ((again - moment).abs() <= step_of(moment, kept, which) * 1.001)[:held].all()


def test_moments_go_from_8_to_32_bits_and_back(tmp_path, flat):
    states = adamw("adamw8bit", cut(flat, 2))
    parts = CheckpointReader(write(tmp_path / "c", 2, flat, states), 2)
    first, second, step = parts.moments(0, parts.size)
    wide = Engine(None, None, torch.optim.AdamW([torch.nn.Parameter(flat)])).as_moments(first, second, step)
    exact = adamw("adamw", cut(flat, 2))[0]
    assert (wide["exp_avg"] - exact["moments.exp_avg"]).abs().max() < 0.02 and wide["step"] == 3
    narrow = Engine(None, None, bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(flat)]))
    again = narrow.as_moments(wide["exp_avg"], wide["exp_avg_sq"], step)
    for which in (1, 2):
        close = again[f"state{which}"].int() - states[0][f"moments.state{which}"].int()
        assert close.abs().max() <= 2 and (close == 0).float().mean() > 0.9


def test_every_flipped_bit_cut_and_missing_file_is_found(tmp_path, flat):
    draw = random.Random(0)
    write(tmp_path / "good", 2, flat, adamw("adamw8bit", cut(flat, 2)))
    assert not fault_of(tmp_path / "good")
    for name in sorted(file.name for file in (tmp_path / "good").iterdir()):
        kept = (tmp_path / "good" / name).read_bytes()
        for _ in range(20):
            damage(tmp_path / "good", name, draw)
            assert fault_of(tmp_path / "good"), name
            with pytest.raises(ValueError, match=r"not a whole checkpoint|manifest\.json' is missing or damaged"):
                Checkpoint.open(tmp_path / "good").weights("ema")
            (tmp_path / "good" / name).write_bytes(kept)
        (tmp_path / "good" / name).write_bytes(kept[:-1])
        assert fault_of(tmp_path / "good") and not complete_checkpoints(tmp_path)
        (tmp_path / "good" / name).unlink()
        assert fault_of(tmp_path / "good")
        (tmp_path / "good" / name).write_bytes(kept)
    assert not fault_of(tmp_path / "good")


def test_weights_are_read_in_the_memory_of_one_copy(tmp_path):
    size = 1 << 25  # 128 MiB
    flat = torch.zeros(size)
    folder = write(tmp_path / "c", 4, flat, [{}] * 4)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"parameters": {f"w{i}": [size // 16] for i in range(16)}}
    write_manifest(folder, manifest)
    del flat
    # Anonymous memory: what is mapped from files is given back when others need it.
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    weights = Checkpoint.open(folder).weights("master")
    done.set()
    watcher.join()
    assert sum(w.nbytes for w in weights.values()) == size * 4
    assert peak[0] - before < 1.2 * size * 4


def own_memory() -> int:
    info = psutil.Process().memory_info()
    return info.rss - info.shared
