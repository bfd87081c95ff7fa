"""What is measured on the device between two log lines, without making the host wait for it."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch

QUARTERS = 4


class Meters:
    """Sums over samples and steps since the last read; one sum over the ranks at each read.

    The quarter of t a sample fell in tells early from late steps of the diffusion: q0 holds the smallest t.
    """

    def __init__(self, device: torch.device, timesteps: int) -> None:
        self.device, self.timesteps = device, timesteps
        self.bad: dict[str, int] = {}
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(QUARTERS, dtype=torch.float64, device=self.device)
        self._sums: dict[str, Tensor] = {}
        self._quarter_loss, self._quarter_count = zeros.clone(), zeros.clone()
        self._good = torch.zeros((), dtype=torch.float64, device=self.device)
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=self.device)
        self._steps, self._seen, self._bad, self._data_seconds, self._started = 0, 0, 0, 0.0, time.perf_counter()

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor], t: Tensor, weight: Tensor, batch: Batch) -> None:
        """Take in the per-sample losses [N] of a micro batch."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + (value.detach() * weight).sum().double()
        quarter = t * QUARTERS // self.timesteps
        self._quarter_loss.index_add_(0, quarter, (losses["mse"].detach() * weight).double())
        self._quarter_count.index_add_(0, quarter, weight.double())
        self._good += weight.sum()
        self._seen += len(t)
        self._bad += len(batch.bad)
        for _, reason in batch.bad:
            self.bad[reason] = self.bad.get(reason, 0) + 1

    def add_step(self, grad_norm: Tensor) -> None:
        """Take in what is known once an optimizer step."""
        self._grad_norm += grad_norm.to(self.device)
        self._steps += 1

    def add_data_wait(self, seconds: float) -> None:
        """Time that the loop waited for a batch."""
        self._data_seconds += seconds

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last read, and start anew; a collective call."""
        seconds = time.perf_counter() - self._started
        local = torch.tensor([self._seen, self._bad], dtype=torch.float64, device=self.device)
        packed = torch.cat([*(v.reshape(1) for v in self._sums.values()), self._good.reshape(1), local,
                            self._quarter_loss, self._quarter_count])  # fmt: skip
        dist.all_reduce(packed)
        values = packed.tolist()
        names, rest = list(self._sums), values[len(self._sums) :]
        good, seen, bad, quarters = max(rest[0], 1.0), rest[1], rest[2], rest[3:]
        metrics = {name: value / good for name, value in zip(names, values, strict=False)}
        for i in range(QUARTERS):
            if quarters[QUARTERS + i]:
                metrics[f"mse_q{i}"] = quarters[i] / quarters[QUARTERS + i]
        metrics |= {
            "grad_norm": self._grad_norm.item() / max(self._steps, 1),
            "images_per_second": seen / seconds,
            "data_wait_share": self._data_seconds / seconds,
            "bad_samples": bad,
            "samples": seen,
        }
        self._reset()
        return metrics
