"""GELU that keeps 1 to 4 bits of each element for backward, instead of the input.

The forward is exact. The derivative is replaced by the best piecewise constant one, and the number of an element's
piece is all that is kept of it. Source: Novikov et al. 2022, "Few-bit Backward", arXiv 2202.00441.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layout import is_channels_last

REACH = 10.0  # the paper weighs the error evenly over [-10, 10]
MAX_BITS = 4


@functools.lru_cache
def best_steps(bits: int) -> tuple[list[float], list[float]]:
    """borders (2^bits - 1) and levels (2^bits), ascending in x, of the best piecewise constant derivative.

    They minimise the integral over [-10, 10] of the squared difference to GELU's derivative: dynamic programming on a
    grid finds the neighbourhood of the minimum, then borders and levels are improved in turn to the last digit.
    Source: arXiv 2202.00441, sections 3 and 4.
    """
    # The derivative minus 1/2 is odd, so the steps mirror each other and only those above 0 are searched.
    pieces = 2 ** (bits - 1)
    grid = np.linspace(0, REACH, 501)
    middle = (grid[1:] + grid[:-1]) / 2
    simpson = (_slope(grid[1:]) ** 2 + 4 * _slope(middle) ** 2 + _slope(grid[:-1]) ** 2) / 6 * np.diff(grid)
    squares = np.concatenate([[0.0], simpson.cumsum()])
    width = grid[None, :] - grid[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (_gelu(grid)[None, :] - _gelu(grid)[:, None]) ** 2 / width
        error = np.where(width > 0, squares[None, :] - squares[:, None] - gain, np.inf)

    best, starts = error[0], []
    for _ in range(pieces - 1):
        candidates = best[:, None] + error
        starts.append(candidates.argmin(0))
        best = candidates.min(0)
    index, inner_edges = len(grid) - 1, []
    for start in reversed(starts):
        index = int(start[index])
        inner_edges.append(index)
    edges = np.concatenate([[0.0], grid[inner_edges[::-1]], [REACH]])

    for _ in range(500):
        levels = np.diff(_gelu(edges)) / np.diff(edges)
        inner = edges[1:-1]  # a view; each border moves to where the slope is half way between its two levels
        inner -= (_slope(inner) - (levels[1:] + levels[:-1]) / 2) / _slope_change(inner)
    borders = [*-edges[-2:0:-1], 0.0, *edges[1:-1]]
    return [float(b) for b in borders], [float(y) for y in [*(1 - levels[::-1]), *levels]]


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def _slope(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) + x * _density(x)


def _slope_change(x: np.ndarray) -> np.ndarray:
    return (2 - x**2) * _density(x)


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """uint8 codes [n] below 2^bits, packed into `bits` bits each: one uint8 tensor; for 3 bits two, of 2 and 1 bits."""
    if bits == 3:
        return [*pack(codes & 3, 2), *pack(codes >> 2, 1)]
    # Element i goes into byte i mod the number of bytes, so that codes are read and written in long runs.
    per_byte = 8 // bits
    rows = F.pad(codes, (0, -codes.numel() % per_byte)).view(per_byte, -1)
    packed = rows[0]
    for row in range(1, per_byte):
        packed = packed | (rows[row] << (row * bits))
    return [packed]


def unpack(packed: list[Tensor], bits: int, n: int) -> Tensor:
    """The uint8 codes [n] that pack() was given."""
    if bits == 3:
        return unpack(packed[:1], 2, n) | (unpack(packed[1:], 1, n) << 2)
    rows = [(packed[0] >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(rows)[:n]


def encode(x: Tensor, borders: list[float]) -> Tensor:
    """The uint8 codes [n] of x's pieces: how many borders |x| is beyond, plus half the number of pieces where x > 0.

    borders: as best_steps returns them, mirrored around 0.
    """
    x = x.reshape(-1)
    half = len(borders) // 2
    size = x.abs()
    # Comparing with each border is several times faster than torch.bucketize, and fuses when compiled.
    codes = (x > 0).view(torch.uint8) * (half + 1)
    for border in borders[half + 1 :]:
        codes = codes + (size > border).view(torch.uint8)
    return codes


def decode(codes: Tensor, levels: Tensor) -> Tensor:
    """The derivative's level for each code. levels: as best_steps returns them."""
    negative, positive = levels.chunk(2)
    return torch.cat([negative.flip(0), positive]).index_select(0, codes.int())


class _FewBitGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, levels: Tensor, borders: list[float], bits: int, packed: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.channels_last = is_channels_last(x)
        in_memory = x.permute(0, 2, 3, 1) if ctx.channels_last else x
        ctx.save_for_backward(levels, *(pack(encode(in_memory, borders), bits) if packed else [in_memory]))
        ctx.borders, ctx.bits, ctx.packed = borders, bits, packed
        return F.gelu(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"a GELU of {ctx.bits} bits has no second derivative: it keeps only the rounded first one; "
                "use activation='gelu', or backward without create_graph"
            )
        levels, *kept = ctx.saved_tensors
        codes = unpack(kept, ctx.bits, grad.numel()) if ctx.packed else encode(kept[0], ctx.borders)
        slopes = decode(codes, levels.to(grad.dtype))
        if ctx.channels_last:
            n, channels, height, width = grad.shape
            slopes = slopes.view(n, height, width, channels).permute(0, 3, 1, 2)
        return grad * slopes.view(grad.shape), None, None, None, None


class FewBitGELU(nn.Module):
    """Exact GELU forward, its derivative rounded to one of 2^bits levels; floats of any dtype and shape.

    bits: 1 to 4.  packed: keep the bits; otherwise the input is kept and rounded in backward, with the same result:
    where the input is computed again anyway, packing saves nothing and takes time.
    Raises: RuntimeError in a double backward.
    """

    levels: Tensor

    def __init__(self, bits: int, packed: bool = True) -> None:
        super().__init__()
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"bits={bits} must lie between 1 and {MAX_BITS}")
        self.bits, self.packed = bits, packed
        self.borders = best_steps(bits)[0]
        self.register_buffer("levels", torch.empty(0), persistent=False)
        self._fill()

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.gelu(x)
        return _FewBitGELU.apply(x, self.levels, self.borders, self.bits, self.packed)

    def _fill(self) -> None:
        self.levels = torch.tensor(best_steps(self.bits)[1], dtype=torch.float32, device=self.levels.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FewBitGELU":
        # This table is in no state dict and must stay fp32: after .to(), .bfloat16() or .to_empty() it is computed
        # again on whatever device it now is.
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:  # .to() cannot copy from meta, where a net is built before its weights are loaded
            self.levels = fn(torch.empty(0))
        self._fill()
        return self
