"""The few-bit GELU and each choice of recomputation: on the device, eager and compiled, against each other."""

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from model.activations import FEW_BIT as FEW_BIT_GELUS
from model.fewbit import FewBitGELU, best_steps, encode, pack, unpack
from model.unet import UNet
from tests.gpu_check.check import Check, Row, attempt, planned, verdict
from tests.gpu_check.nets import (
    FEW_BIT,
    KEEP,
    RECOMPUTE,
    Images,
    all_gradients,
    allow_many_compilations,
    backend,
    build,
    compile_whole,
    different,
    distance,
    exact_arithmetic,
    images,
    results,
    shape,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of float32 nets: distance of the outputs, and of the gradients, in which a value near a border may change its level.
OUTPUT, GRADIENTS = 1e-5, 2e-3
# Of bfloat16 nets: compiled may be so many times as far from float32 as eager is.
TIMES, MORE = 1.5, 2e-3


def run(check: Check) -> Iterator[Row]:
    """Rows of the bits, then of nets: recomputed against kept, compiled against eager."""
    exact_arithmetic()
    torch.use_deterministic_algorithms(True, warn_only=True)  # else two equal backwards may differ
    warnings.simplefilter("ignore")
    allow_many_compilations()  # at torch's limit it would run eagerly without a word
    bits = [(f"bits of {name}, {dtype}", name, dtype) for name, dtype in product(FEW_BIT_GELUS, DTYPES)]
    recomputed = [(f"{mode}, {dtype}", mode, dtype) for mode, dtype in product(RECOMPUTE[1:], DTYPES)]
    kinds = [*((FEW_BIT, mode) for mode in RECOMPUTE), ("gelu", KEEP)]
    kinds += [(name, KEEP) for name in FEW_BIT_GELUS if name != FEW_BIT]
    compiled = [(f"compiled {activation}, {mode}", activation, mode, "nchw") for activation, mode in kinds]
    compiled += [(f"compiled {FEW_BIT}, {KEEP}, nhwc", FEW_BIT, KEEP, "nhwc")]
    if check.tiny:  # a compilation takes seconds on a CPU
        bits, compiled = [row for row in bits if row[1] == FEW_BIT][1:], compiled[1:2]
    yield from planned(name for name, *_ in [*bits, *recomputed, *compiled])
    for name, activation, dtype in bits:
        yield attempt(name, lambda n=name, a=activation, d=dtype: packed_bits(check, n, FEW_BIT_GELUS[a], DTYPES[d]))
    config = shape(check, "small")
    torch.manual_seed(0)
    net = build(config, check.device, activation=FEW_BIT)
    nets = {dtype: copy.deepcopy(net).to(dtype) for dtype in DTYPES.values()}
    batch = images(config, 2 if check.tiny else 8, check.device)
    for name, mode, dtype in recomputed:
        yield attempt(name, lambda n=name, m=mode, d=dtype: as_kept(check, n, m, nets[DTYPES[d]], batch))
    for name, *how in compiled:
        yield attempt(name, lambda n=name, how=how: against_eager(check, n, *how, nets, batch))
        torch.compiler.reset()


def values(dtype: torch.dtype, bits: int) -> Tensor:
    """Numbers of every piece, the borders between them, their neighbours, and some far away."""
    borders = torch.tensor(best_steps(bits)[0])
    near = torch.cat([borders * factor for factor in (1, 1 - 1e-6, 1 + 1e-6, 0.99, 1.01)])
    far = torch.tensor([0.0, -0.0, 10.0, -10.0, 1e4, -1e4])
    drawn = torch.randn(100_003, generator=torch.Generator().manual_seed(bits)) * 2
    return torch.cat([near, far, drawn]).to(dtype)


def packed_bits(check: Check, name: str, bits: int, dtype: torch.dtype) -> Row:
    """Codes, their packing and the gradient: on the device against the CPU, compiled against eager."""
    x = values(dtype, bits)
    borders, _ = best_steps(bits)

    def codes_and_bytes(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        codes = encode(x, borders)
        return codes, pack(codes, bits)

    def gradient(x: Tensor, run: bool) -> Tensor:
        gelu: Callable[[Tensor], Tensor] = FewBitGELU(bits).to(x.device)
        if run:
            gelu = torch.compile(gelu, fullgraph=True, dynamic=False, backend=backend(check))
        x = x.clone().requires_grad_()
        gelu(x).backward(torch.linspace(-1, 1, len(x)).to(x))
        assert x.grad is not None
        return x.grad

    codes, packed = codes_and_bytes(x)
    on_device = x.to(check.device)
    eager = codes_and_bytes(on_device)
    compiled = torch.compile(codes_and_bytes, fullgraph=True, dynamic=False, backend=backend(check))(on_device)
    wrong = []
    if not (torch.equal(eager[0].cpu(), codes) and all(map(torch.equal, [p.cpu() for p in eager[1]], packed))):
        wrong.append("the device's bits are not the CPU's")
    if not torch.equal(unpack(eager[1], bits, len(x)), eager[0]):
        wrong.append("what is unpacked is not what was packed")
    if not torch.equal(unpack(compiled[1], bits, len(x)), compiled[0]):
        wrong.append("what is unpacked is not what was packed by the compiled code")
    moved = compiled[0] != eager[0]
    # The compiled code compares with the border itself, the eager one with the border in the dtype of x: what is equal
    # to that may fall on either side, and on either side the level is equally far from the slope.
    ties = torch.isin(on_device, torch.tensor(borders).to(on_device))
    if bool((moved & ~ties).any()):
        wrong.append(f"compiled, {int((moved & ~ties).sum())} codes away from the borders are others")
    slopes = [gradient(on_device, run) for run in (False, True)]
    apart = distance(slopes[1][~ties], slopes[0][~ties])
    if apart > (0 if dtype == torch.float32 else 2**-7):
        wrong.append(f"compiled, the gradient is {apart:.1e} away")
    text = "; ".join(wrong) or f"device = CPU, compiled = eager but for {int(moved.sum())} of {len(x)} on a border"
    return verdict(name, not wrong, text, ties=int(ties.sum()), moved=int(moved.sum()), gradient_distance=apart)


def like(net: UNet, check: Check, activation: str, mode: str, layout: str = "nchw") -> UNet:
    """A net with the parameters of another, and an activation, recomputation and layout of its own."""
    dtype = next(net.parameters()).dtype
    return build(net.config, check.device, dtype, activation, mode, like=net, layout=layout)


def as_kept(check: Check, name: str, mode: str, net: UNet, batch: Images) -> Row:
    """Recomputation gives the gradients of keeping everything, to the bit."""
    expected = results(like(net, check, FEW_BIT, KEEP), batch)
    again = different(results(like(net, check, FEW_BIT, KEEP), batch), expected)
    found = results(like(net, check, FEW_BIT, mode), batch)
    unequal = different(found, expected)
    total, worst, _ = all_gradients(found, expected)
    if again:  # the device does not repeat itself, so equal bits can't be asked for
        text = f"two equal runs differ in {len(again)} tensors; gradients {total:.1e} from those of keeping all"
        return verdict(name, total < (1e-5 if "float32" in name else 1e-2), text, gradients=total)
    text = (
        f"{len(unequal)} tensors differ, the worst {worst}" if unequal else f"{len(expected)} tensors, equal to the bit"
    )
    return verdict(name, not unequal, f"against keeping all: {text}", gradients=total)


def against_eager(
    check: Check, name: str, activation: str, mode: str, layout: str, nets: dict[torch.dtype, UNet], batch: Images
) -> Row:
    """The compiled net's output and gradients against the eager one's in nchw, in float32 and bfloat16."""
    found: dict[str, float] = {}
    eager = {dtype: results(like(net, check, activation, mode), batch) for dtype, net in nets.items()}
    exact = eager[torch.float32]
    for label, dtype in DTYPES.items():
        compiled = results(compile_whole(like(nets[dtype], check, activation, mode, layout), check), batch)
        for what, values in (("compiled", compiled), ("eager", eager[dtype])):
            found[f"output_{label}_{what}"] = distance(values["out"], exact["out"])
            found[f"gradients_{label}_{what}"], *_ = all_gradients(values, exact)
    out, gradients = found["output_float32_compiled"], found["gradients_float32_compiled"]
    half = all(
        found[f"{what}_bfloat16_compiled"] <= TIMES * found[f"{what}_bfloat16_eager"] + MORE
        for what in ("output", "gradients")
    )
    text = (
        f"float32: output {out:.1e}, gradients {gradients:.1e} from eager; bfloat16 from eager float32: gradients "
        f"{found['gradients_bfloat16_compiled']:.1e} (eager {found['gradients_bfloat16_eager']:.1e})"
    )
    return verdict(name, out < OUTPUT and gradients < GRADIENTS and half, text, backend=backend(check), **found)
