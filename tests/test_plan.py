"""The plan against real tensors of the real engine, against arithmetic by hand, and for 512 ranks on paper."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from launch.compose import compose_config
from launch.cost.estimate import Options, Plan, make_plan
from launch.cost.memory import REDUCE_BUCKET, moments_bytes, most_that_fits, partition, states
from launch.cost.page import render
from launch.cost.step_cost import image_flops, step_bytes
from launch.cost.traffic import checkpoint_bytes, collectives
from launch.plan import main
from model.recompute import MEMORY
from model.unet import UNetConfig
from tests.trainings import free_port
from train.monitor.gpus import GPUS

SMALL = ["+experiment=smoke", "micro_batch=2", "global_batch=8", "data.tokens=16"]
TINY = [*SMALL, "precision=bf16", "model.image_size=16", "model.channel_mult=[1,2]", "model.attention_resolutions=[8]"]


def measured(repo, tmp_path, ranks: int, *overrides: str) -> dict[str, int]:
    out, port = tmp_path / "found.json", str(free_port())
    command = [sys.executable, "-m", "tests.measured_step", str(out), *SMALL, *overrides]
    common = os.environ | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command, cwd=repo, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, errors[0][-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("ranks", "precision", "optimizer", "memory"),
    [(2, "bf16", "adamw8bit", "keep"), (1, "fp32", "adamw", "recompute_blocks")],
)
def test_bytes_of_a_real_step(repo, tmp_path, ranks, precision, optimizer, memory):
    overrides = [
        f"precision={precision}",
        f"optim.name={optimizer}",
        f"model.memory={memory}",
        "model.activation=gelu_3bit",
    ]
    found = measured(repo, tmp_path, ranks, *overrides)
    config = compose_config([*SMALL, *overrides])
    width = {"bf16": 2, "fp32": 4}[precision]
    planned = states(found["parameters"], ranks, optimizer, width)
    for name in ("weights", "master", "moments", "ema"):
        assert getattr(planned, name) == pytest.approx(found[name], rel=0.001), name
    assert found["gradients"] == width * found["parameters"] and found["bucket"] == width * REDUCE_BUCKET

    for accumulated, name in ((False, "peak"), (True, "accumulated_peak")):
        step = step_bytes(config.model, config.micro_batch, precision, accumulated, config.data.tokens)
        assert step.kept == pytest.approx(found["kept"], rel=0.05)
        assert step.peak == pytest.approx(found[name], rel=0.05), name

    wires = collectives(found["parameters"], ranks, width)
    if ranks > 1:  # beside the norm of the gradients
        assert wires.reduced == pytest.approx(found["all_reduce"], rel=0.001)
        assert wires.gathered == pytest.approx(found["all_gather_into_tensor"], rel=0.001)


def test_flops_by_hand():
    """A net of one level with one residual block each way, and attention: every layer's products counted here."""
    net = UNetConfig(
        image_size=8, model_channels=64, channel_mult=[1], num_res_blocks=1, attention_resolutions=[8],
        num_head_channels=32, encoder_dim=48, encoder_channels=96, att_pool_heads=4,
    )  # fmt: skip
    pixels, ch, emb, tokens, wide, text = 64, 64, 64, 5, 48, 96

    def conv(into: int, out: int, kernel: int = 3) -> int:
        return 2 * pixels * into * out * kernel**2

    def res(into: int) -> int:
        shortcut = conv(into, ch, 1) if into != ch else 0
        return conv(into, ch) + conv(ch, ch) + shortcut + 2 * emb * 2 * ch

    keys = pixels + tokens
    attention = (
        2 * pixels * ch * 3 * ch + 2 * tokens * text * 2 * ch + 2 * 2 * pixels * keys * ch + 2 * pixels * ch * ch
    )
    # 1 in, 2 in the middle, 2 out, which take the skips too; attention after the first, in the middle, after the outer
    blocks = res(ch) + 2 * res(ch) + 2 * res(2 * ch) + 4 * attention
    # the mean of the tokens asks, it and the tokens answer
    pooling = 2 * wide * wide + 2 * 2 * (tokens + 1) * wide * wide + 2 * 2 * (tokens + 1) * wide
    embedding = 2 * ch * emb + 2 * emb * emb + 2 * tokens * wide * text + pooling + 2 * wide * emb
    expected = conv(3, ch) + blocks + conv(ch, 6) + embedding
    found = image_flops(net, tokens)
    assert found.forward == pytest.approx(expected, rel=0.005)
    # The image and the text need no gradient, and attention's backward makes its scores again.
    assert found.done == pytest.approx(found.model, rel=0.02)


def test_xl_is_what_is_known_of_it(repo):
    config = compose_config(["+experiment=if_i_xl"])
    flops = image_flops(config.model)
    assert flops.forward == pytest.approx(2.879e12, rel=0.001)
    assert flops.model * config.global_batch == pytest.approx(26.5e15, rel=0.002)
    step = step_bytes(config.model, 1, "bf16", accumulated=True)
    # docs/measurements/benchmarks.md, counted by another walk.
    assert step.kept == pytest.approx(722.4e6, rel=0.01)
    assert step.peak > 2 * 4_304_695_110 + step.kept


def test_512_ranks_on_paper():
    count = 4_304_695_110
    kept = states(count, 512, "adamw8bit", 2)
    assert partition(count, 512) * 512 - count < 2 * 512
    assert kept.ema == pytest.approx(34e6, rel=0.02)
    saved = states(count, 512, "adamw", 2).moments - kept.moments
    assert saved == pytest.approx(50e6, rel=0.02)
    assert checkpoint_bytes(kept, 512) == pytest.approx(count * (4 + 4 + 2 + 8 / 256), rel=0.001)
    assert moments_bytes(4095, "adamw8bit") == 8 * 4095, "too small for 8 bits"


def test_lora_is_planned_with_the_same_parts():
    kept = states(trained=10_000_000, ranks=1, optimizer="adamw", weight_bytes=2, frozen=4_304_695_110)
    assert kept.weights == 2 * 4_314_695_110 and kept.master == 40_000_000 and kept.moments == pytest.approx(80_000_000)


@pytest.mark.parametrize("room", [5, 99, 100, 101, 1234, 5000])
def test_the_most_that_fits_is_found_with_few_walks(room):
    asked = []

    def needs(n: int) -> int:
        asked.append(n)
        return max(100, 40 + 17 * n)

    expected = max((n for n in range(1000) if n and max(100, 40 + 17 * n) <= room), default=0)
    assert most_that_fits(needs, 6, room) == expected
    assert len(asked) <= 7, asked


@pytest.fixture(scope="module")
def plan() -> Plan:
    options = Options(nodes=2, gpus_per_node=1, link=8, link_efficiency=0.5, mfu=0.1)
    return make_plan(options, compose_config(TINY))


def test_link_and_mfu_make_the_time(plan):
    assert set(plan.choices) == set(MEMORY)
    # A ring of two: gradients twice and weights once, half of each, at 1 GB/s of which half is reached.
    assert plan.times.communication == pytest.approx((2 * 2 + 2) * plan.parameters / 2 / 0.5e9, rel=0.001)
    assert plan.times.compute == pytest.approx(plan.flops.done * 8 / (2 * GPUS["a100-80g"].tflops * 1e12 * 0.1))
    assert plan.times.bottleneck == "communication"
    slow = replace(plan.times, reading=1000.0)
    assert slow.bottleneck == "reading" and slow.step == 1000


def test_the_page(plan):
    page = render(plan)
    for part in (*MEMORY, "MEMORY OF A GPU", "FLOPS", "COMMUNICATION", "DATA", "CHECKPOINTS", "TIME", "bottleneck",
                 "ASSUMED", "a100-80g", "8 Gbit/s a node", "GPU-hours", "largest micro batch that fits"):  # fmt: skip
        assert part in page, part
    assert max(map(len, page.splitlines())) <= 160


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nodes=3", "gpus_per_node=1"], "no micro_batch fits 3 ranks"),
        (["nodes=1", "gpus_per_node=8"], "micro_batch=1 would fit 8 ranks"),
        (["nodes=0"], "nodes=0 must be above 0"),
        (["gpu=a100"], "a100-80g"),
        (["mfu=40"], "mfu=40.0 is a share"),
        (["micro_bath=2"], "micro_bath"),
        (["model.memory=all"], "memory='all'"),
        (["+experiment=unknown"], "unknown"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, told):
    with pytest.raises(SystemExit) as exit:
        main([*(SMALL if "+experiment=unknown" not in arguments else []), *arguments])
    assert told in str(exit.value) and "\n" not in str(exit.value)
