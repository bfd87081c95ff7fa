"""What autograd keeps between forward and backward, and what is computed again instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# keep: all that autograd asks for.  recompute_cheap: what convolutions and projections give, and attention's q, k, v;
# norms, activations and copies are done again.  recompute_blocks: the inputs of the blocks alone.
MEMORY = ("keep", "recompute_cheap", "recompute_blocks")


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), autograd keeping what it wants."""
    return function(*args)


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which only args are kept.

    Backward runs the function again, but only until it has the last thing that it needs: a convolution or projection at
    the end is not repeated, for what backward wants of it is its input.  function: without random draws.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # Without the check that the second run gave the same shapes: it can't differ, and the check takes 2 % of a step.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
