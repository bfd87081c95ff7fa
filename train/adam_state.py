"""The state of AdamW (torch) and AdamW8bit (bitsandbytes): its names, its size, and Adam's two moments in fp32.

AdamW keeps step, exp_avg and exp_avg_sq. AdamW8bit keeps step, state1 and state2: in fp32 if they have few elements,
otherwise as 8-bit codes, with the codes' values in qmap1 and qmap2 and a scale for each block in absmax1 and absmax2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# bitsandbytes' own choices: elements that share a scale, counted from the beginning of a rank's part; the fewest
# elements that are kept in 8 bits; the number of codes.
BLOCK = 256
FEWEST_8BIT = 4096
CODES = 256
FP32 = 4

# 8-bit codes, the scale of each block and the value of each code, of a moment and whether it has a sign.
Quantize = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def moments_bytes(elements: int, optimizer: str) -> int:
    """Bytes of the state for so many elements.  optimizer: 'adamw' or 'adamw8bit'."""
    if optimizer == "adamw":
        return 2 * FP32 * elements + FP32  # with the step, a tensor
    if elements < FEWEST_8BIT:
        return 2 * FP32 * elements
    return 2 * (elements + FP32 * -(-elements // BLOCK) + FP32 * CODES)


def kind(state: Mapping[str, Any]) -> str:
    """Whose state this is: 'adamw', 'adamw8bit', or '' if it is empty."""
    return "adamw" if "exp_avg" in state else "adamw8bit" if "state1" in state else ""


def decode(state: Mapping[str, Any], which: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of Adam's first or second moment, in fp32.

    state: tensors, or slices of a file, of which no more is read.  which: 1 or 2.
    """
    if kind(state) == "adamw":
        moment: Tensor = state[("exp_avg", "exp_avg_sq")[which - 1]][start:stop]
        return moment
    codes: Tensor = state[f"state{which}"][start:stop]
    if f"absmax{which}" not in state:
        return codes
    first = start // BLOCK
    scales = state[f"absmax{which}"][first : -(-stop // BLOCK)].repeat_interleave(BLOCK)[start - first * BLOCK :]
    table: Tensor = state[f"qmap{which}"][:]
    return table[codes.int()] * scales[: len(codes)]


def encode(first: Tensor, second: Tensor, step: int, quantize: Quantize | None) -> dict[str, Tensor]:
    """The state with these two moments, in fp32: that of AdamW, or with `quantize` that of AdamW8bit."""
    if quantize is None:
        return {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    state = {"step": torch.tensor(step), "state1": first, "state2": second}
    if first.numel() >= FEWEST_8BIT:
        for which, moment in ((1, first), (2, second)):
            state |= zip((f"state{which}", f"absmax{which}", f"qmap{which}"), quantize(moment, which == 1), strict=True)
    return state


def for_optimizer(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """A state from a file as the optimizer keeps it: on the device, but for the step."""
    # bitsandbytes keeps its step as an int, torch as a tensor on the CPU.
    return {
        name: value.to(device) if value.ndim else int(value) if value.dtype == torch.int64 else value
        for name, value in state.items()
    }
