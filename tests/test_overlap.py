"""Gradients are all-reduced while the backward goes on, to the same bits as behind it."""

import json
import os
import subprocess
import sys

import pytest

from model.config import RECOMPUTE
from tests.support.trainings import free_port

RANKS = 2
TINY = """
    +experiment=smoke steps=100 data.streams=1 optim.warmup_steps=2 micro_batch=1 data.tokens=5 model.encoder_dim=64
    model.image_size=16 model.channel_mult=[1,2] model.attention_resolutions=[8]
""".split()
# Micro batches in a step; 2 are added up before the all-reduce.
ONE, MORE = f"global_batch={RANKS}", f"global_batch={2 * RANKS}"
LORA = ["lora.rank=4", "init_from=released", "optim.name=adamw"]
FAST = [["precision=bf16", MORE, "model.activation=gelu_3bit", "recompute=cheap"]]
SLOW = [
    *([f"precision={p}", batch, f"recompute={r}"] for p in ("bf16", "fp32") for batch in (ONE, MORE) for r in RECOMPUTE),
    *([f"precision={p}", ONE, "model.activation=gelu_3bit", f"recompute={r}"] for p in ("bf16", "fp32") for r in RECOMPUTE),
    *([f"precision={p}", batch, *LORA] for p in ("bf16", "fp32") for batch in (ONE, MORE)),
    ["precision=fp32", ONE, "optim.name=adamw"],
]  # fmt: skip


def run(repo, out, cases: list[list[str]]) -> list[list[list[dict]]]:
    """What each rank found, by case and by way: behind the backward, and inside it."""
    command = [sys.executable, "-m", "tests.support.overlapped_steps", str(out), json.dumps([TINY + c for c in cases])]
    common = os.environ | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command, cwd=repo, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    errors = [process.communicate(timeout=500)[1] for process in started]
    assert [process.returncode for process in started] == [0] * RANKS, errors[0][-3000:]
    return [json.loads(out.with_name(f"{out.name}.{rank}").read_text()) for rank in range(RANKS)]


def check(found: list[list[list[dict]]], cases: list[list[str]]) -> None:
    for rank in found:
        for case, (behind, inside) in zip(cases, rank, strict=True):
            assert inside["same"] == behind["same"], case
            assert behind["same"]["stepped"] and len(set(behind["same"]["norms"])) > 1, case
            per_step = 2 if MORE in case else 1
            for step in range(0, len(inside["inside"]), per_step):
                *accumulated, last = inside["buckets"][step : step + per_step]
                assert behind["buckets"][step : step + per_step] == [0] * (per_step - 1) + [1], case
                assert not any(accumulated) and last > 5, "the all-reduce waits for the step's last micro batch"
            handed = inside["inside"][per_step - 1 :: per_step]
            assert min(handed) > 0.5 > 0 == max(behind["inside"]), case
    for one, other in zip(*found, strict=True):
        for way in (0, 1):
            assert one[way]["same"]["weights"] == other[way]["same"]["weights"]
            assert one[way]["same"]["master"] != other[way]["same"]["master"], "each rank has a part of its own"


def test_the_same_bits_as_behind_the_backward(repo, tmp_path):
    check(run(repo, tmp_path / "found", FAST), FAST)


@pytest.mark.slow
def test_the_same_bits_for_every_choice(repo, tmp_path):
    check(run(repo, tmp_path / "found", SLOW), SLOW)
