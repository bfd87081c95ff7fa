"""Imports that do not load torch's compiler, which takes two seconds of each rank's start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_torch_compile() -> Iterator[None]:
    """Inside the block torch.compile gives every function back as it is.

    bitsandbytes wraps four functions in it at import: those of its backend for other devices than CPUs and NVIDIA's
    GPUs, and of 4-bit weights. No training calls them.
    """

    def as_it_is(function: Callable | None = None, **_: Any) -> Callable:
        return function or as_it_is

    compile_, torch.compile = torch.compile, as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
