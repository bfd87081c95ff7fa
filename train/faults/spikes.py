"""Steps whose error or gradient norm leaps out of those before, and the batches that a run has left out for it.

The error is the mse. The loss has the variational term too, which is 720 times the mse at the last t of 1000, and
leaps with each such sample; the gradient hardly feels it (docs/reference/checkpoints.md).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from train.faults.preempt import RankConsensus

# A step is compared with at most so many before it, and not before there are MIN_STEPS of them.
WINDOW, MIN_STEPS = 200, 30
# Makes the median absolute deviation the standard deviation, where values are Gaussian.
MAD_TO_SIGMA = 1.4826
# The deviation is taken to be at least this share of the median: of equal values none is a spike by rounding.
LEAST_DEVIATION = 0.01
QUANTITIES = ("mse", "grad_norm")


@dataclass(slots=True)
class SpikeMemory:
    """What a run remembers of its spikes; a checkpoint's manifest holds it.

    left_out: for each rollback {"batch": index of the global batch in the order, "what": text}.
    window: of each of QUANTITIES the values of the last WINDOW steps.
    """

    left_out: list[dict] = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})

    def __post_init__(self) -> None:
        self.window = {name: self.window.get(name, []) for name in QUANTITIES}

    @property
    def batches(self) -> list[int]:
        """The batches that are left out."""
        return [entry["batch"] for entry in self.left_out]


@dataclass(slots=True)
class JudgedStep:
    """A step that is not judged yet.

    errors: the micro batches' numbers and mse [N].  local: mean mse of this rank, and the norm of the gradient, on
    their way to the host.  means: waits for their means over the ranks.
    """

    step: int
    errors: list[tuple[int, Tensor]]
    local: Tensor
    means: Callable[[], list[float]] | None = None


class Spikes:
    """Judges each step two steps later, when its numbers have reached the host and all ranks without a wait for them.

    All ranks judge the same means, so they find the same spikes. What is judged so far goes into `memory`.
    """

    def __init__(self, factor: float, memory: SpikeMemory, consensus: RankConsensus) -> None:
        self._factor, self._consensus, self.memory = factor, consensus, memory
        self._steps: deque[JudgedStep] = deque()

    @torch.no_grad()
    def add(self, step: int, errors: list[tuple[int, Tensor]], grad_norm: Tensor) -> None:
        """Add a step that was made; collective, as the other methods."""
        if self._steps and self._steps[-1].means is None:  # the host has waited for the device since
            self._ask(self._steps[-1])
        mean = torch.cat([values for _, values in errors]).double().mean()
        local = torch.stack([mean, mean.new_zeros(()) + grad_norm]).to("cpu", non_blocking=True)
        self._steps.append(JudgedStep(step, errors, local))

    def judge(self, all_steps: bool = False) -> tuple[JudgedStep, str] | None:
        """Judge what was asked a step ago; the first spike among it, and what it is in words.

        all_steps: judge up to the last step, for which the host waits for the device.
        """
        while self._steps and (all_steps or len(self._steps) > 2):
            oldest = self._steps.popleft()
            if oldest.means is None:
                if all_steps and oldest.local.is_pinned():
                    torch.cuda.current_stream().synchronize()
                self._ask(oldest)
            assert oldest.means is not None
            if what := self._compare(oldest.means()):
                return oldest, what
        return None

    def _ask(self, step: JudgedStep) -> None:
        step.means = self._consensus.mean(step.local)

    def _compare(self, means: list[float]) -> str:
        """Compare a step with those before it, then add it to them; in words what is too high, '' for nothing."""
        found = []
        for name, value in zip(QUANTITIES, means, strict=True):
            window = self.memory.window[name]
            if len(window) >= MIN_STEPS and value > (limit := spike_limit(window, self._factor)):
                found.append(
                    f"{name} {value:.4g} (the median of the {len(window)} steps before is {median(window):.4g}, the "
                    f"limit {limit:.4g})"
                )
            # Spikes too: a median bears them, and what stays at a new level becomes the usual.
            if math.isfinite(value):
                self.memory.window[name] = [*window, value][-WINDOW:]
        return ", ".join(found)


def spike_limit(values: list[float], factor: float) -> float:
    """What is above is a spike: the median and `factor` standard deviations, by the median absolute deviation."""
    middle = median(values)
    sigma = MAD_TO_SIGMA * median(abs(value - middle) for value in values)
    return middle + factor * max(sigma, LEAST_DEVIATION * abs(middle))
