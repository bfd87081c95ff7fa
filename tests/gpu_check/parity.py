"""Our net against diffusers' UNet2DConditionModel on the device: the same random weights, outputs and gradients.

diffusers' net in float64 gives the exact values. Ours in float64 must equal them; in float32 (without TF32) and
bfloat16 ours must be about as near to them as diffusers' own net of that precision.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from model.activations import FEW_BIT
from model.config import UNetConfig
from model.convert import to_diffusers
from model.unet import UNet
from tests.gpu_check.check import Check, Row, attempt, planned, verdict
from tests.gpu_check.nets import (
    Images,
    all_gradients,
    build,
    build_peer,
    distance,
    exact_arithmetic,
    images,
    results,
    shape,
)

NEEDS = ("diffusers",)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of float64 nets; both compute the timestep's cosines and sines in float32.
SAME = 1e-5
# Ours may be so many times as far from the exact values as diffusers', and so much more.
TIMES, MORE = 1.5, {"float32": 2e-6, "bfloat16": 1e-3}


def run(check: Check) -> Iterator[Row]:
    """Rows of each precision, of nhwc, of the few-bit GELU's forward, and of a small net of the second stage."""
    exact_arithmetic()
    second = "second stage, "
    names = ["float64", *PRECISIONS, "float32, nhwc"]
    yield from planned([*names, "few-bit GELU's forward", *(second + name for name in names)])
    yield from of_net(check, shape(check, "M"))
    yield attempt("few-bit GELU's forward", lambda: exact_forward(check, shape(check, "small")))
    for row in of_net(check, shape(check, "small II")):
        yield replace(row, name=second + row.name)


def of_net(check: Check, config: UNetConfig) -> Iterator[Row]:
    """Rows of each precision and of nhwc for one net."""
    torch.manual_seed(0)
    ours = build(config, check.device, torch.float64)
    theirs = build_peer(config, check.device, torch.float64)
    theirs.net.load_state_dict(to_diffusers(ours.state_dict(), config), strict=True)
    batch = images(config, 2, check.device)
    exact = of_peer(theirs, batch)
    yield attempt("float64", lambda: float64(ours, batch, exact))
    for name, dtype in PRECISIONS.items():
        peer = of_peer(copy.deepcopy(theirs).to(dtype), batch)
        yield attempt(name, lambda name=name, dtype=dtype, peer=peer: nearness(name, ours, dtype, batch, exact, peer))
        if name == "float32":
            name = "float32, nhwc"
            yield attempt(name, lambda name=name, peer=peer: nearness(name, ours, torch.float32, batch, exact, peer))


def of_peer(net: torch.nn.Module, batch: Images) -> dict[str, Tensor]:
    """Output and gradients of diffusers' net, by its own names."""
    return results(net, batch, lambda gradients: {name.removeprefix("net."): g for name, g in gradients.items()})


def of_ours(net: UNet, batch: Images) -> dict[str, Tensor]:
    """Output and gradients of ours, by diffusers' names."""
    return results(net, batch, lambda gradients: to_diffusers(gradients, net.config))


def float64(ours: UNet, batch: Images, exact: dict[str, Tensor]) -> Row:
    """Both nets in float64."""
    found = of_ours(ours, batch)
    out, (total, worst, at_worst) = distance(found["out"], exact["out"]), all_gradients(found, exact)
    spread = float(exact["out"].std())
    return verdict(
        "float64", out < SAME and at_worst < 10 * SAME and spread > 0.1,
        f"output {out:.1e}, gradients {total:.1e}, the worst {at_worst:.1e} ({worst}), relative to diffusers'",
        output=out, gradients=total, worst=at_worst, worst_name=worst, output_std=spread,
    )  # fmt: skip


def nearness(
    name: str, ours: UNet, dtype: torch.dtype, batch: Images, exact: dict[str, Tensor], peer: dict[str, Tensor]
) -> Row:
    """How far ours and diffusers' of this precision are from the exact values."""
    net = copy.deepcopy(ours).to(dtype)
    if "nhwc" in name:
        net = build(ours.config, str(batch.t.device), dtype, like=net, layout="nhwc")
    found = of_ours(net, batch)
    out, out_peer = (distance(values["out"], exact["out"]) for values in (found, peer))
    (total, worst, at_worst), (total_peer, *_) = (all_gradients(values, exact) for values in (found, peer))
    more = MORE[name.split(",")[0]]
    return verdict(
        name, out <= TIMES * out_peer + more and total <= TIMES * total_peer + more,
        f"distance from float64: output {out:.1e} (diffusers' {out_peer:.1e}), gradients {total:.1e} "
        f"({total_peer:.1e}), the worst {at_worst:.1e} ({worst})",
        output=out, output_diffusers=out_peer, gradients=total, gradients_diffusers=total_peer,
        worst=at_worst, worst_name=worst,
    )  # fmt: skip


def exact_forward(check: Check, config: UNetConfig) -> Row:
    """With gradients asked for, the few-bit nets give the exact GELU's output to the bit."""
    unequal = []
    for dtype in PRECISIONS.values():
        net = build(config, check.device, dtype)
        batch = images(config, 2, check.device)
        expected = results(net, batch)["out"]
        for activation in FEW_BIT:
            found = results(build(config, check.device, dtype, activation, like=net), batch)["out"]
            if not torch.equal(found, expected):
                unequal.append(f"{activation} in {dtype}")
    text = f"not equal: {', '.join(unequal)}" if unequal else "1 to 4 bits, float32 and bfloat16, equal to the bit"
    return verdict("few-bit GELU's forward", not unequal, text)
