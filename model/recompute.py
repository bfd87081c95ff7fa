"""What autograd keeps between forward and backward, and what backward computes again; the choices: model.config."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args); autograd keeps all that it asks for."""
    return function(*args)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which only args are kept for backward.

    Backward runs the function again, but only until it has the last tensor that it needs: a convolution or projection
    at the end is not repeated, because backward needs its input alone.  function: makes no random draws.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # The check that the second run gives the same shapes is off: they cannot differ, and it takes 2 % of a step.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
