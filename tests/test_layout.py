"""The net with its channels last computes what it computes with them first, and transposes no activations for it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import nn

from data.text.meta import TextMeta
from model.attention import AttentionBlock
from model.blocks import ResBlock
from model.config import RECOMPUTE
from model.unet import UNet
from tests.benchmarks import conv_layout
from tests.gpu_check.nets import TINY, all_gradients, build, distance, images, results
from tests.support.overlapped_steps import make_net
from tests.support.trainings import free_port
from tests.test_config import load
from tests.test_overlap import TINY as RUN
from train.compose import compose_config
from train.engine import init_distributed
from train.inputs import Inputs
from train.loop import build as build_run
from train.monitor.step_memory import inputs

FEW_BIT = "gelu_3bit"


def both(activation: str, recompute: str, backend: str = "", dtype=torch.float64) -> tuple[dict, dict]:
    """Output and gradients of the same random weights in nchw and in nhwc, the second compiled by the backend."""
    torch.manual_seed(0)
    first = build(TINY, "cpu", torch.float64, activation, recompute).to(dtype)
    last = UNet(replace(TINY, activation=activation), recompute, "nhwc").to(dtype)
    last.load_state_dict(first.state_dict(), strict=True)
    if backend:
        last.compile_stages(backend)
    batch = images(TINY, 2, "cpu")
    return results(first, batch), results(last, batch)


@pytest.mark.parametrize(
    ("activation", "recompute", "backend"),
    [("gelu", "none", ""), *((FEW_BIT, recompute, "") for recompute in RECOMPUTE), (FEW_BIT, "none", "eager")],
)
def test_the_same_output_and_gradients_within_rounding(activation, recompute, backend):
    first, last = both(activation, recompute, backend)
    assert float(first["out"].std()) > 0.1
    # The timestep's cosines and sines are of float32.
    assert distance(last["out"], first["out"]) < 1e-12
    total, worst, at_worst = all_gradients(last, first)
    assert at_worst < 1e-10, (total, worst)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("activation", ["gelu", FEW_BIT])
def test_the_same_when_compiled(activation, recompute):
    first, last = both(activation, recompute, "aot_eager")
    assert distance(last["out"], first["out"]) < 1e-12 and all_gradients(last, first)[2] < 1e-10


def test_bf16_is_as_near_to_the_exact_values():
    exact, _ = both(FEW_BIT, "none")
    first, last = both(FEW_BIT, "none", "eager", torch.bfloat16)
    far = distance(first["out"], exact["out"])
    assert distance(last["out"], exact["out"]) < 1.5 * far < 0.15


def test_every_block_keeps_the_channels_last():
    net, seen = UNet(replace(TINY, activation=FEW_BIT), layout="nhwc"), []

    def look(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        seen.append((type(module).__name__, out.is_contiguous(memory_format=torch.channels_last)))

    for module in net.modules():
        if isinstance(module, ResBlock | AttentionBlock | nn.Conv2d | nn.GroupNorm) and module is not net:
            module.register_forward_hook(look)
    batch = images(TINY, 2, "cpu")
    net(batch.noise, batch.t, batch.text_emb)
    assert {name for name, _ in seen} == {"ResBlock", "AttentionBlock", "Conv2d", "GroupNorm"}
    # The norm of the text has no pixels.
    assert {name for name, last in seen if not last} == {"GroupNorm"}


@pytest.mark.slow
def test_activations_are_not_transposed():
    config = replace(TINY, activation=FEW_BIT)
    first, last = (conv_layout.count(config, layout, 2) for layout in ("nchw", "nhwc"))
    assert first["convolutions"] == last["convolutions"] > 20
    assert first["weights"] == last["weights"] > 0
    assert last["activations"] < 0.05 * first["activations"] and last["transposed"] < first["transposed"]


def print_steps() -> None:
    """Weights, masters and norms of the engine after two steps, by layout; as a process of its own."""
    UNet.compile_stages = partialmethod(UNet.compile_stages, "aot_eager")  # needs no compiler of C++
    _, ranks, device = init_distributed()
    found = []
    for layout in ("nchw", "nhwc"):
        config = compose_config([*RUN, "global_batch=1", "compile=true", "precision=fp32", f"layout={layout}"])
        engine = build_run(config, Inputs([], TextMeta("", "", "", 5, 64, "float16", "float32", "")), ranks, device)
        engine.set_weights(make_net(config).state_dict())
        torch.manual_seed(0)
        norms = []
        for _ in range(2):
            engine.backward(engine(*inputs(config.model, 1, 5)).float().square().mean())
            engine.step()
            norms.append(float(engine.grad_norm()))
        names = {name: list(p.shape) for name, p in engine.model.named_parameters()}
        found.append([names, norms, engine.master.tolist()])
        engine.engine.destroy()
    print(json.dumps(found))


@pytest.mark.slow
def test_the_engine_trains_either_to_the_same_masters(repo):
    code = "from tests.test_layout import print_steps; print_steps()"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (names, norms, master), (names_last, norms_last, master_last) = json.loads(done.stdout.splitlines()[-1])
    assert names == names_last and norms_last == pytest.approx(norms, rel=1e-4) and min(norms) > 0.1
    # The partition has the same order: of another one no two elements would fit.
    assert distance(torch.tensor(master_last), torch.tensor(master)) < 1e-4


def test_it_is_for_compiled_nets(repo):
    assert load(repo, "+experiment=if_i_xl", "layout=nhwc").compile
    with pytest.raises(ValueError, match="layout=nhwc needs compile=true"):
        load(repo, "+experiment=if_i_xl", "layout=nhwc", "compile=false")
    with pytest.raises(ValueError, match="layout=NHWC must be one of nchw, nhwc"):
        load(repo, "+experiment=if_i_xl", "layout=NHWC")
