"""The plan against real tensors of the real engine, against arithmetic by hand, and for 512 ranks on paper."""

import json
from dataclasses import replace

import pytest
import torch

from launch.cost.estimate import Plan, make_plan
from launch.cost.options import PlanOptions
from launch.cost.overlap import Bucket, exposed_seconds, fill_buckets
from launch.cost.page import render
from launch.cost.traffic import checkpoint_bytes, collectives
from launch.plan import main
from model.config import RECOMPUTE, UNetConfig
from model.unet import UNet
from tests.support.trainings import run_ranks
from train.adam_state import moments_bytes
from train.compose import compose_config
from train.config import Config, LoRAConfig, OptimConfig
from train.engine import optimizer
from train.monitor.flops import Flops, Gradient, peak_flops, training_flops
from train.monitor.gpus import GPUS, find_device
from train.monitor.memory import (
    averages_of,
    construction,
    largest_parameter,
    most_that_fits,
    partition,
    peak,
    snapshot_bytes,
    states,
)
from train.monitor.step_memory import inputs, step_bytes, walk_bytes, walk_step
from train.weights.lora import add_lora

SMALL = ["+experiment=smoke", "micro_batch=2", "global_batch=8", "data.tokens=16", "model.encoder_dim=64"]
TINY = [*SMALL, "precision=bf16", "model.image_size=16", "model.channel_mult=[1,2]", "model.attention_resolutions=[8]"]


def measured(repo, tmp_path, ranks: int, *overrides: str) -> dict[str, int]:
    out = tmp_path / "found.json"
    run_ranks(repo, ranks, "-m", "tests.support.measured_step", str(out), *SMALL, *overrides)
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("ranks", "precision", "optimizer", "recompute", "accumulate"),
    [
        (2, "bf16", "adamw8bit", "none", 1),
        pytest.param(1, "fp32", "adamw", "blocks", 4, marks=pytest.mark.slow),
    ],
)
def test_bytes_of_a_real_step(repo, tmp_path, ranks, precision, optimizer, recompute, accumulate):
    overrides = [
        f"global_batch={ranks * 2 * accumulate}",
        f"precision={precision}",
        f"optim.name={optimizer}",
        f"recompute={recompute}",
        "model.activation=gelu_3bit",
    ]
    found = measured(repo, tmp_path, ranks, *overrides)
    config = compose_config([*SMALL, *overrides])
    width = {"bf16": 2, "fp32": 4}[precision]
    planned = states(found["parameters"], ranks, optimizer, width)
    for name in ("weights", "master", "moments", "ema"):
        assert getattr(planned, name) == pytest.approx(found[name], rel=0.001), name
    gradients, largest = width * found["parameters"], largest_parameter(config)
    assert found["gradients"] == (gradients if accumulate > 1 else 0), "the last micro batch leaves none"
    assert found["bucket"] == width * largest
    assert construction(found["parameters"], ranks, width) == pytest.approx(found["construction"], rel=0.001)
    walked = walk_step(config.model, precision, config.data.tokens, recompute=config.recompute)
    added = walked.bytes(config.micro_batch, accumulated=accumulate > 1)
    planned_peak = peak(added, found["parameters"], ranks, width, largest).backward
    # There is room for the rank's part when the first of it is reduced. Here most activations have gone by then.
    room = width * min(found["parameters"], partition(found["parameters"], ranks) + 2 * largest)
    assert 0.98 * (planned_peak - room) < found["backward"] + found["gradients"] <= planned_peak

    for accumulated, name in ((False, "peak"), (True, "accumulated_peak")):
        step = walked.bytes(config.micro_batch, accumulated)
        assert step.kept == pytest.approx(found["kept"], rel=0.001)
        assert step.peak == pytest.approx(found[name], rel=0.01), name

    traffic = collectives(found["parameters"], ranks, width)
    flops = training_flops(config.model, config.data.tokens, recompute=recompute)
    filled = fill_buckets(flops, largest, compiled=False)
    if ranks > 1:
        *in_buckets, _, _ = found["all_reduce"]  # then the overflow and the norm of the gradients
        assert in_buckets == [width * bucket.elements for bucket in filled]
        assert sum(in_buckets) == traffic.reduced
        assert found["all_gather_into_tensor"] == [traffic.gathered]


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_by_hand(rank):
    """A net of one level with one residual block each way, and attention: every layer's products counted here."""
    net = UNetConfig(
        image_size=8, model_channels=64, channel_mult=[1], num_res_blocks=1, attention_resolutions=[8],
        num_head_channels=32, encoder_dim=48, encoder_channels=96, att_pool_heads=4,
    )  # fmt: skip
    pixels, ch, emb, tokens, wide, text = 64, 64, 64, 5, 48, 96

    def product(rows: int, into: int, out: int) -> int:
        return 2 * rows * into * out

    def conv(into: int, out: int, kernel: int = 3) -> int:
        return product(pixels, into * kernel**2, out)

    def res_convs(into: int) -> int:
        return conv(into, ch) + conv(ch, ch) + (conv(into, ch, 1) if into != ch else 0)

    first, image, last = res_convs(ch), conv(3, ch), conv(ch, 6)
    later = 2 * res_convs(ch) + 2 * res_convs(2 * ch)  # 2 in the middle; 2 on the way out, which take the skips too
    time = 5 * product(1, emb, 2 * ch)  # into each of the residual blocks
    qkv, keys, out = product(pixels, ch, 3 * ch), product(tokens, text, 2 * ch), product(pixels, ch, ch)
    scores = 2 * product(pixels, ch, pixels + tokens)
    projected = product(tokens, wide, text)
    # the mean of the tokens asks, it and the tokens answer
    pooling = product(1, wide, wide) + 2 * product(tokens + 1, wide, wide) + 2 * product(1, wide, tokens + 1)
    embedding = 2 * product(1, ch, emb) + pooling + product(1, wide, emb)
    # Attention is after the first residual block, in the middle, and after both of those on the way out.
    forward = image + first + later + last + time + 4 * (qkv + keys + scores + out) + projected + embedding
    if not rank:
        flops = training_flops(net, tokens)
        assert flops.forward == pytest.approx(forward, rel=0.005)
        # Each product has two in the backward; the image, the time and the text need no gradient.
        no_gradient = image + projected + product(1, ch, emb)
        assert flops.total == pytest.approx(3 * forward - no_gradient, rel=0.005)
        return

    def lora(rows: int, into: int, out: int) -> tuple[int, int]:
        return product(rows, into, rank), product(rows, rank, out)

    matrices = [lora(pixels, ch, 3 * ch), lora(tokens, text, 2 * ch), lora(pixels, ch, ch)]
    forward += 4 * sum(map(sum, matrices))
    # Gradients of activations alone, of frozen layers behind the first qkv: its input and the text need none.
    frozen = later + last + 3 * qkv + 4 * out
    trained = 4 * 2 * sum(map(sum, matrices)) - matrices[0][0] - 4 * matrices[1][0]
    flops = training_flops(net, tokens, LoRAConfig(rank=rank))
    assert flops.forward == pytest.approx(forward, rel=0.005)
    assert flops.total - flops.forward == pytest.approx(frozen + trained + 4 * 2 * scores, rel=0.005)
    assert flops.total < 2.5 * forward, "not the gradients of the frozen weights"


def test_xl_is_what_is_known_of_it(repo):
    config = compose_config(["+experiment=if_i_xl"])
    flops = training_flops(config.model, 77)
    assert flops.forward == pytest.approx(2.879e12, rel=0.001)
    assert flops.total * config.global_batch == pytest.approx(26.5e15, rel=0.002)
    step = step_bytes(config.model, 1, "bf16", accumulated=True)
    # docs/measurements/benchmarks.md, counted by another walk.
    assert step.kept == pytest.approx(722.4e6, rel=0.01)
    assert step.peak > 2 * 4_304_695_110 + step.kept


@pytest.mark.parametrize("elements", [4095, 4096, 10_000])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_bytes_of_the_moments_are_those_of_the_real_optimizer(name, elements):
    parameter = torch.nn.Parameter(torch.zeros(elements))
    parameter.grad = torch.ones(elements)
    real = optimizer([parameter], OptimConfig(name=name))
    real.step()
    tensors = [value for value in real.state[parameter].values() if isinstance(value, torch.Tensor)]
    assert moments_bytes(elements, name) == sum(value.nbytes for value in tensors)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("A100-SXM4-40GB", "a100-40g"), ("NVIDIA A10", "a10-24g"),
        ("NVIDIA A10G", "a10g-24g"), ("NVIDIA H100 80GB HBM3", "h100-80g"), ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24g"), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A10M", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_whole_name(monkeypatch, device, name):
    assert find_device(device) is (GPUS[name] if name else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)  # no such cards here
    assert peak_flops(torch.device("cuda")) == (GPUS[name].tflops * 1e12 if name else None)
    assert peak_flops(torch.device("cpu")) is None


def test_512_ranks_on_paper():
    count = 4_304_695_110
    resident = states(count, 512, "adamw8bit", 2)
    assert partition(count, 512) * 512 - count < 2 * 512
    assert resident.ema == pytest.approx(34e6, rel=0.02)
    with_power_averages = states(count, 512, "adamw8bit", 2, averages=averages_of(Config(ema_snapshot_every=50_000)))
    assert with_power_averages.ema == 3 * resident.ema and averages_of(Config()) == 1
    assert 512 * snapshot_bytes(count, 512) == pytest.approx(count * 4, rel=0.001)
    saved = states(count, 512, "adamw", 2).moments - resident.moments
    assert saved == pytest.approx(50e6, rel=0.02)
    assert checkpoint_bytes(resident, 512) == pytest.approx(count * (4 + 4 + 2 + 8 / 256), rel=0.001)


def test_lora_is_planned_with_the_same_parts():
    lora = states(trained=10_000_000, ranks=1, optimizer="adamw", weight_bytes=2, frozen=4_304_695_110)
    assert lora.weights == 2 * 4_314_695_110 and lora.master == 40_000_000 and lora.moments == pytest.approx(80_000_000)


def test_the_plan_of_a_lora_run_counts_its_own_compute():
    """What metrics.py divides by for the MFU: without the gradients of the frozen weights."""
    config = compose_config([*TINY, "init_from=released", "lora.rank=4"])
    plan = make_plan(PlanOptions(nodes=2, gpus_per_node=1), config)
    assert plan.flops == training_flops(config.model, config.data.tokens, config.lora)
    assert plan.model_flops < 0.8 * 8 * training_flops(config.model, config.data.tokens).total
    assert plan.times.compute == pytest.approx(plan.model_flops / (2 * 312e12 * 0.4))
    none, cheap, blocks = (cost.flops.total for cost in plan.costs.values())
    assert none < cheap < blocks


@pytest.mark.parametrize("available", [5, 99, 100, 101, 1234, 5000])
def test_the_most_that_fits(available):
    def needs(n: int) -> int:
        return max(100, 40 + 17 * n)

    assert most_that_fits(needs, available) == max((n for n in range(1, 1000) if needs(n) <= available), default=0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=4)])
def test_one_walk_tells_the_bytes_of_every_micro_batch(recompute, lora):
    """To the byte, against real tensors of several micro batches, with gradients there before and without."""
    config = compose_config([*SMALL, "model.activation=gelu_3bit", "precision=fp32"])
    walked = walk_step(config.model, "fp32", 16, lora, recompute)
    for micro_batch in (1, 2, 5):
        unet = UNet(config.model, recompute)
        if lora.rank:
            add_lora(unet, lora)
        args = inputs(config.model, micro_batch, 16)
        assert walked.bytes(micro_batch) == walk_bytes(unet, args)
        again = walk_bytes(unet, args).peak + sum(p.nbytes for p in unet.parameters() if p.requires_grad)
        assert walked.bytes(micro_batch, accumulated=True).peak == again


@pytest.fixture(scope="module")
def plan() -> Plan:
    options = PlanOptions(nodes=2, gpus_per_node=1, link=8, link_efficiency=0.5, mfu=0.1)
    validated = ["data.validation.shards=a", "data.validation.text=b", "data.validation.samples=20", "validate_every=5"]
    return make_plan(options, compose_config([*TINY, *validated]))


def test_link_and_mfu_make_the_time(plan):
    assert set(plan.costs) == set(RECOMPUTE)
    # A ring of two: gradients twice and weights once, half of each, at 1 GB/s of which half is reached.
    before = plan.nothing_hidden(8)
    assert before.all_reduce == pytest.approx(2 * 2 * plan.parameters / 2 / 0.5e9, rel=0.001)
    assert before.all_gather == pytest.approx(2 * plan.parameters / 2 / 0.5e9, rel=0.001)
    # The backward is so much faster than the network that almost nothing is hidden.
    assert 0.9 * before.all_reduce < plan.times.all_reduce < before.all_reduce
    assert plan.times.step == pytest.approx(before.step - plan.networks[8].hidden)
    assert plan.times.all_gather == before.all_gather, "nothing hides it"
    # More room never makes the backward wait longer.
    configured, *_, all_at_once = plan.buckets
    assert all(all_at_once.networks[link].exposed <= network.exposed for link, network in plan.networks.items())
    assert configured.memory == 2 * 2 * plan.largest and all_at_once.memory == 2 * plan.parameters
    assert plan.times.compute == pytest.approx(plan.flops.total * 8 / (2 * GPUS["a100-80g"].tflops * 1e12 * 0.1))
    assert plan.times.bottleneck == "all_reduce"
    slow = replace(plan.times, reading=1000.0)
    assert slow.bottleneck == "reading" and slow.step == 1000


def test_the_page(plan):
    page = render(plan)
    for part in (*RECOMPUTE, "MEMORY OF A GPU", "FLOPS", "COMMUNICATION", "BUCKETS", "DATA", "CHECKPOINTS", "TIME",
                 "nothing hidden", "overlapped", "BY LINK", "at 200 Gbit/s", "at 800", "at 1600", "bottleneck",
                 "ASSUMED", "a100-80g", "8 Gbit/s a node", "GPU-hours", "largest micro batch that fits"):  # fmt: skip
        assert part in page, part
    assert max(map(len, page.splitlines())) <= 160
    # 20 samples at 8 timesteps on two ranks of 2 a micro batch, beside 5 steps of 8 forwards and backwards.
    (line,) = [line for line in page.splitlines() if "validation" in line]
    assert "every 5 steps" in line and "  40 forwards a rank" in line and f"{160 / 120:.2%} of the run" in line
    without = replace(plan, config=replace(plan.config, validate_every=0))
    assert "validation" not in render(without)
    assert "ema_snapshot_every=0" in page and "a snapshot of averages" not in page
    tracked = render(replace(plan, config=replace(plan.config, ema_snapshot_every=2)))
    assert "EMA and 2 averages" in tracked and "a snapshot of averages every 2 steps" in tracked
    (line,) = [line for line in tracked.splitlines() if "of the run, which stay" in line]
    assert line.split()[1] == str(plan.config.steps // 2)


@pytest.mark.parametrize(
    ("buffers", "exposed"),
    [
        # 2 s of each all-reduce, ready after 1, 2, 3 and 10 s: sent by 3, 5, 7 and 12 where the backward never waits.
        (5, 2.0),
        # With two buckets the second waits for the first until 3, the third for the second until 5, which makes the
        # backward 2 s late: the last is ready at 12 and sent by 14.
        (2, 4.0),
    ],
)
def test_exposed_seconds_by_hand(buffers, exposed):
    assert exposed_seconds([1.0, 2.0, 3.0, 10.0], [4e9] * 4, rate=4e9, efficiency=0.5, buffers=buffers) == exposed


def test_exposed_is_all_of_one_bucket_and_the_last_where_the_link_is_fast():
    assert exposed_seconds([3.0], [2e9], rate=1e9) == 2.0
    assert exposed_seconds([1.0, 2.0, 3.0], [1e6, 1e6, 2e6], rate=1e9) == pytest.approx(0.002)


def test_buckets_by_hand():
    names = ("out.2.weight", "output_blocks.1.0.weight", "output_blocks.1.1.weight", "encoder_pooling.0.weight",
             "encoder_proj.weight")  # fmt: skip
    sizes, flops = (4, 3, 3, 6, 1), (10, 20, 30, 60, 100)
    gradients = tuple(map(Gradient, names, sizes, flops))
    counted = Flops(forward=50, total=150, gradients=gradients)
    # Handed over when the next has no room: 4 + 3, then 3 + 6 would be 9, then 6 + 1 in the end.
    assert fill_buckets(counted, 7, compiled=False) == [Bucket(7, 0.3), Bucket(3, 0.6), Bucket(7, 1.0)]
    # Compiled, both of a block come at its end, and both of the text.
    assert fill_buckets(counted, 7, compiled=True) == [Bucket(7, 0.3), Bucket(3, 1.0), Bucket(7, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodes=3", "gpus_per_node=1"], "no micro_batch fits 3 ranks"),
        (["nodes=1", "gpus_per_node=8"], "micro_batch=1 would fit 8 ranks"),
        (["nodes=0"], "nodes=0 must be at least 1"),
        (["gpu=a100-80gb"], "(did you mean 'a100-80g'?)"),
        (["mfu=40"], "mfu=40.0 must lie between 0 and 1"),
        (["mfu=0"], "mfu=0.0 must be at least 0.001"),
        (["storage=nan"], "storage=nan must be at least 0"),
        (["micro_bath=2"], "micro_bath"),
        (["recompute=all"], "recompute=all must be one of none, cheap, blocks"),
        (["+experiment=unknown"], "experiment=unknown must be one of"),
        (["nods=3"], "unknown key 'nods' (did you mean 'nodes'?)"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([*(SMALL if "+experiment=unknown" not in arguments else []), *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
