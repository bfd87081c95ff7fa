"""What is measured between two lines of the log; the host does not wait for the device before a line is due."""

import resource
import time
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from train.config import Config, accumulation
from train.ema import EMA
from train.engine import Engine
from train.monitor.flops import peak_flops, training_flops
from train.monitor.phases import OWN, PHASES, PhaseTimes
from train.monitor.stragglers import Place, Stragglers
from train.noise import DeviceBatch

QUARTERS = 4
BY_QUARTER = ("mse", "mse_mean")
# Norms are estimated from every 64th weight: over that many weights the estimate is exact to a few parts in a thousand.
STRIDE = 64


class Metrics:
    """Sums over samples and steps since the last reduce(), which sums over the ranks and starts again from zero.

    Errors are also kept by quarter of t, which tells early from late steps of the diffusion: q0 holds the smallest t.
    bad_counts: bad samples of this rank since the start, by reason.
    """

    def __init__(self, device: torch.device, config: Config) -> None:
        self.device, self.timesteps, self.clip = device, config.diffusion_steps, config.optim.grad_clip
        self.bad_counts: dict[str, int] = {}
        self._several_captions = len(config.data.captions) > 1
        self._peak = peak_flops(device)
        self._flops = training_flops(config.model, config.data.tokens, config.lora).total if self._peak else 0.0
        self._weights_before: Tensor | None = None
        self._times = PhaseTimes(device, accumulation(config, dist.get_world_size() if dist.is_initialized() else 1))
        self._stragglers = Stragglers()
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(QUARTERS, dtype=torch.float64, device=self.device)
        self._loss_sums: dict[str, Tensor] = {}
        self._quarter_sums, self._quarter_count = {name: zeros.clone() for name in BY_QUARTER}, zeros.clone()
        self._good, self._grad_norm, self._clipped, self._update_square, self._weight_square = zeros.new_zeros(
            5
        ).unbind()
        self._steps, self._samples, self._started = 0, 0, time.perf_counter()
        self._bad: dict[str, int] = {}
        self._lacks = self._enlarged = 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as one of PHASES, without a wait for the device."""
        return self._times.phase(name)

    @property
    def slowest(self) -> Place | None:
        """Where the rank runs that is furthest behind the others, if that is known."""
        return self._stragglers.slowest

    @torch.no_grad()
    def add_micro_batch(self, losses: dict[str, Tensor], batch: DeviceBatch) -> None:
        """Add the per-sample losses [N] of a micro batch."""
        t, weight = batch.t, batch.weight
        for name, value in losses.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0) + (value.detach() * weight).sum().double()
        quarter = t * QUARTERS // self.timesteps
        for name, total in self._quarter_sums.items():
            total.index_add_(0, quarter, (losses[name].detach() * weight).double())
        self._quarter_count.index_add_(0, quarter, weight.double())
        self._good += weight.sum()
        self._samples += len(t)
        self._lacks, self._enlarged = self._lacks + batch.lacks, self._enlarged + batch.enlarged
        for _, reason in batch.bad:
            self._bad[reason] = self._bad.get(reason, 0) + 1
            self.bad_counts[reason] = self.bad_counts.get(reason, 0) + 1

    @torch.no_grad()
    def add_step(self, engine: Engine) -> None:
        """Add the norms of an optimizer step."""
        norm = engine.grad_norm()
        self._grad_norm += norm
        if self.clip:
            self._clipped += norm > self.clip
        self._steps += 1
        if self._weights_before is not None:  # only the first step after reduce() is measured, as a sample of them
            weights = engine.master.detach()[::STRIDE]
            self._update_square = (weights - self._weights_before).square().sum()
            self._weight_square = weights.square().sum()
            self._weights_before = None

    @torch.no_grad()
    def reduce(self, engine: Engine, ema: EMA) -> dict[str, float]:
        """Means over all ranks since the last call; then the sums start again from zero. A collective call."""
        seconds, ranks = time.perf_counter() - self._started, dist.get_world_size()
        weights = engine.master.detach()[::STRIDE]
        memory, own = torch.zeros(ranks), torch.zeros(ranks, len(OWN))
        memory[dist.get_rank()] = self._memory()
        self._times.read()  # before this step's end all of them have passed: the host waited for its gradient
        own[dist.get_rank()] = torch.tensor(self._times.own())
        local = {
            "losses": torch.stack([*self._loss_sums.values()]) if self._loss_sums else torch.empty(0),
            "counts": torch.tensor([self._samples, sum(self._bad.values()), self._lacks, self._enlarged]),
            "good": self._good,
            "quarters": torch.cat([*self._quarter_sums.values(), self._quarter_count]),
            "grad": torch.stack([self._grad_norm, self._clipped]),
            "update_to_weight": torch.stack([self._update_square, self._weight_square]),
            "ema_distance": torch.stack([(weights - ema.average[::STRIDE]).square().sum(), weights.square().sum()]),
            "memory": memory,
            "own": own,
        }
        # One tensor, so that there is one collective and one wait for the device.
        packed = torch.cat([v.reshape(-1).to(self.device, torch.float64) for v in local.values()])
        dist.all_reduce(packed)
        sums = dict(zip(local, packed.cpu().split([v.numel() for v in local.values()]), strict=True))
        self._times.read()  # the rest, since the sums above were read from the device
        by_phase = self._times.take()

        (samples, bad, lacks, enlarged), steps = sums["counts"].tolist(), max(self._steps, 1)
        good = max(float(sums["good"]), 1.0)
        values = {name: float(value) / good for name, value in zip(self._loss_sums, sums["losses"], strict=True)}
        *by_quarter, counts = sums["quarters"].view(-1, QUARTERS).tolist()
        for name, totals in zip(BY_QUARTER, by_quarter, strict=True):
            values |= {f"{name}_q{i}": totals[i] / counts[i] for i in range(QUARTERS) if counts[i]}
        grad_norm, clipped = (sums["grad"] / (steps * ranks)).tolist()
        values |= {"grad_norm": grad_norm, "grad_clipped_share": clipped}
        for name in ("update_to_weight", "ema_distance"):
            if sums[name][1] > 0:
                values[name] = float((sums[name][0] / sums[name][1]).sqrt())
        per_gpu = samples / seconds / ranks
        values |= {
            "images_per_second": samples / seconds,
            "images_per_second_per_gpu": per_gpu,
            "data_wait_share": by_phase["data"] / seconds,
            "memory_gb": float(sums["memory"].max()) / 1e9,
            "bad_samples": bad,
            "samples": samples,
            "enlarged_samples": enlarged,
        }
        values |= {f"seconds_{name}": by_phase[name] / steps for name in PHASES}
        values |= self._stragglers.add(sums["own"].view(ranks, -1))
        if self._peak:
            values["mfu"] = per_gpu * self._flops / self._peak
        if self._several_captions:
            values["captions_lacking"] = lacks
        if bad:
            values |= self._bad_of_all_ranks()
        self._reset()
        self._weights_before = weights.clone()
        return values

    def _memory(self) -> float:
        """Bytes: on a GPU the peak allocation since the last call, on a CPU the peak resident set of the process."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(peak)

    def _bad_of_all_ranks(self) -> dict[str, float]:
        """Bad samples by reason; a collective call, which every rank makes because the summed count is not zero."""
        counts_of_ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(counts_of_ranks, self._bad)
        reasons = sorted({reason for counts in counts_of_ranks for reason in counts})
        return {f"bad/{reason}": float(sum(counts.get(reason, 0) for counts in counts_of_ranks)) for reason in reasons}
