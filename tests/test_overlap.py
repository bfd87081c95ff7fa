"""Gradients are all-reduced while the backward goes on, to the same bits as behind it."""

import json
from functools import partialmethod

import pytest

from data.text.meta import TextMeta
from model.config import RECOMPUTE
from model.unet import UNet
from tests.support.handed_over import handed_over
from tests.support.trainings import run_ranks
from train.compose import compose_config
from train.engine import init_distributed
from train.inputs import Inputs
from train.loop import build
from train.monitor.step_memory import inputs

RANKS = 2
TINY = [
    "+experiment=smoke", "steps=100", "data.streams=1", "optim.warmup_steps=2", "micro_batch=1", "data.tokens=5",
    "model.encoder_dim=64", "model.image_size=16", "model.channel_mult=[1,2]", "model.attention_resolutions=[8]",
]  # fmt: skip
# Micro batches in a step; 2 are added up before the all-reduce.
ONE, MORE = f"global_batch={RANKS}", f"global_batch={2 * RANKS}"
LORA = ["lora.rank=4", "init_from=released", "optim.name=adamw"]
FAST = [["precision=bf16", MORE, "model.activation=gelu_3bit", "recompute=cheap"]]
PRECISIONS, BATCHES, FEW_BIT = ("precision=bf16", "precision=fp32"), (ONE, MORE), "model.activation=gelu_3bit"
SLOW = [
    *([p, batch, f"recompute={r}"] for p in PRECISIONS for batch in BATCHES for r in RECOMPUTE),
    *([p, ONE, FEW_BIT, f"recompute={r}"] for p in PRECISIONS for r in RECOMPUTE),
    *([p, batch, *LORA] for p in PRECISIONS for batch in BATCHES),
    ["precision=fp32", ONE, "optim.name=adamw"],
]


def run(repo, out, cases: list[list[str]]) -> list[list[list[dict]]]:
    """What each rank found, by case and by way: behind the backward, and inside it."""
    run_ranks(repo, RANKS, "-m", "tests.support.overlapped_steps", str(out), json.dumps([TINY + c for c in cases]))
    return [json.loads(out.with_name(f"{out.name}.{rank}").read_text()) for rank in range(RANKS)]


def assert_same_bits(found: list[list[list[dict]]], cases: list[list[str]]) -> None:
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
    assert_same_bits(run(repo, tmp_path / "found", FAST), FAST)


@pytest.mark.slow
def test_the_same_bits_for_every_choice(repo, tmp_path):
    assert_same_bits(run(repo, tmp_path / "found", SLOW), SLOW)


def print_share_handed_over() -> None:
    """The share of a compiled net's gradients that is handed over by 80 % of the backward, and the bucket's elements.

    As a process of its own, for it joins a group.
    """
    UNet.compile_stages = partialmethod(UNet.compile_stages, "aot_eager")  # needs no compiler of C++
    config = compose_config([*TINY, "global_batch=1", "compile=true", "model.num_res_blocks=2"])
    _, ranks, device = init_distributed()
    engine = build(config, Inputs([], TextMeta("", "", "", 5, 64, "float16", "float32", "")), ranks, device)
    for _ in range(4):
        record = handed_over(engine, engine(*inputs(config.model, 1, 5)).float().square().mean())
        engine.step()
    largest = max(parameter.numel() for parameter in engine.model.parameters())
    bucket = engine.engine.optimizer.reduce_bucket_size
    print(json.dumps({"share": record.share(0.8), "largest": largest, "bucket": bucket, "calls": len(record.buckets)}))


def test_half_of_a_compiled_nets_gradients_are_handed_over_by_80_percent_of_the_backward(repo):
    code = "from tests.test_overlap import print_share_handed_over; print_share_handed_over()"
    found = json.loads(run_ranks(repo, 1, "-c", code).splitlines()[-1])
    assert found["bucket"] == found["largest"] and found["calls"] > 10
    assert found["share"] >= 0.5
