"""What is measured between two log lines, without making the host wait for the device."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader.batch import Batch
from train.config import Config
from train.ema import EMA
from train.engine import Engine
from train.monitor.flops import peak_flops, training_flops

QUARTERS = 4
PHASES = ("data", "forward", "backward", "step", "save", "sample")
# Of the others the device keeps the time: the host is through with them long before.
ON_HOST = ("data", "save", "sample")
# Of the weights every 64th is compared: a norm over so many of them is known to a few parts in a thousand.
EVERY = 64


class Metrics:
    """Sums over samples and steps since the last read; one sum over the ranks at each read.

    The quarter of t a sample fell in tells early from late steps of the diffusion: q0 holds the smallest t.
    """

    def __init__(self, device: torch.device, config: Config) -> None:
        self.device, self.timesteps, self.clip = device, config.diffusion_steps, config.optim.grad_clip
        self.bad: dict[str, int] = {}
        self._peak = peak_flops(device)
        self._flops = training_flops(config.model, config.data.tokens, config.lora).total if self._peak else 0.0
        self._before: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(QUARTERS, dtype=torch.float64, device=self.device)
        self._sums: dict[str, Tensor] = {}
        self._quarter_loss, self._quarter_count = zeros.clone(), zeros.clone()
        # good samples; norms of the gradient and how many were clipped; squares of an update and of the weights
        self._good, self._grad_norm, self._clipped, self._moved, self._size = zeros.new_zeros(5).unbind()
        self._steps, self._seen, self._started = 0, 0, time.perf_counter()
        self._bad: dict[str, int] = {}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done within it; on a GPU by events that the device passes, and nobody waits for."""
        if self.device.type == "cuda" and name not in ON_HOST:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((name, began, ended))
            return
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

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
        for _, reason in batch.bad:
            self._bad[reason] = self._bad.get(reason, 0) + 1
            self.bad[reason] = self.bad.get(reason, 0) + 1

    @torch.no_grad()
    def add_step(self, engine: Engine) -> None:
        """Take in what is known once an optimizer step."""
        norm = engine.grad_norm().to(self.device)
        self._grad_norm += norm
        if self.clip:
            self._clipped += norm > self.clip
        self._steps += 1
        if self._before is not None:  # the first step since the last read stands for all of them
            now = engine.master.detach()[::EVERY]
            self._moved, self._size = (now - self._before).square().sum(), now.square().sum()
            self._before = None

    @torch.no_grad()
    def read(self, engine: Engine, ema: EMA) -> dict[str, float]:
        """Means over all ranks since the last read, and start anew; a collective call."""
        seconds, ranks = time.perf_counter() - self._started, dist.get_world_size()
        master = engine.master.detach()[::EVERY]
        distance = torch.stack([(master - ema.average[::EVERY]).square().sum(), master.square().sum()])
        memory = torch.zeros(ranks)
        memory[dist.get_rank()] = self._memory()
        parts = {
            "losses": torch.stack([*self._sums.values()]) if self._sums else torch.empty(0),
            "counts": torch.tensor([self._seen, sum(self._bad.values())]),
            "good": self._good, "quarters": torch.cat([self._quarter_loss, self._quarter_count]),
            "grad": torch.stack([self._grad_norm, self._clipped]), "moved": torch.stack([self._moved, self._size]),
            "distance": distance, "memory": memory,
        }  # fmt: skip
        packed = torch.cat([v.reshape(-1).to(self.device, torch.float64) for v in parts.values()])
        dist.all_reduce(packed)
        sums = dict(zip(parts, packed.cpu().split([v.numel() for v in parts.values()]), strict=True))
        self._add_events()  # all are passed, since the sum above was read

        (seen, bad), quarters, steps = sums["counts"].tolist(), sums["quarters"].tolist(), max(self._steps, 1)
        good = max(float(sums["good"]), 1.0)
        metrics = {name: float(value) / good for name, value in zip(self._sums, sums["losses"], strict=True)}
        for i in range(QUARTERS):
            if quarters[QUARTERS + i]:
                metrics[f"mse_q{i}"] = quarters[i] / quarters[QUARTERS + i]
        grad_norm, clipped = (sums["grad"] / (steps * ranks)).tolist()
        metrics |= {"grad_norm": grad_norm, "grad_clipped_share": clipped}
        for name, part in (("update_to_weight", "moved"), ("ema_distance", "distance")):
            if sums[part][1] > 0:
                metrics[name] = float((sums[part][0] / sums[part][1]).sqrt())
        per_gpu = seen / seconds / ranks
        metrics |= {
            "images_per_second": seen / seconds,
            "images_per_second_per_gpu": per_gpu,
            "data_wait_share": self._seconds["data"] / seconds,
            "memory_gb": float(sums["memory"].max()) / 1e9,
            "bad_samples": bad,
            "samples": seen,
        }
        metrics |= {f"seconds_{name}": self._seconds[name] / steps for name in PHASES}
        if self._peak:
            metrics["mfu"] = per_gpu * self._flops / self._peak
        if bad:
            metrics |= self._bad_by_reason()
        self._reset()
        self._before = master.clone()
        return metrics

    def _memory(self) -> float:
        """Bytes: the most that the device had allocated since the last call, or of a CPU run the most ever resident."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(most)

    def _add_events(self) -> None:
        for name, began, ended in self._events:
            self._seconds[name] += began.elapsed_time(ended) / 1000
        self._events.clear()

    def _bad_by_reason(self) -> dict[str, float]:
        """Of all ranks; a collective call, made where the ranks have seen that there are some."""
        everywhere: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, self._bad)
        reasons = sorted({reason for counts in everywhere for reason in counts})
        return {f"bad/{reason}": float(sum(counts.get(reason, 0) for counts in everywhere)) for reason in reasons}
