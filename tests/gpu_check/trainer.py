"""A small training of the project's own step, for resume, syncs and memory: ZeRO-1 with AdamW8bit, or torch's AdamW.

The first needs deepspeed and bitsandbytes; torch's AdamW on a float32 net takes its place without them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader.batch import Batch
from model.config import UNetConfig
from model.diffusion import Diffusion
from model.losses import training_losses
from tests.gpu_check.check import Check, missing
from tests.gpu_check.nets import KEEP, TIMESTEPS, TOKENS, build, compile_whole
from train.noise import DeviceBatches

ENGINE = ("deepspeed", "bitsandbytes")
ACCUMULATE, STEPS = 2, 1000


@dataclass(frozen=True, slots=True)
class Spec:
    """What is trained. config: its net, to which activation and recompute are added."""

    config: UNetConfig
    micro_batch: int
    activation: str
    recompute: str = KEEP
    compiled: bool = False


def has_engine() -> bool:
    """Whether the project's own engine can be imported here."""
    return not missing(*ENGINE)


def make_batch(spec: Spec, number: int, pin: bool) -> Batch:
    """The micro batch of a number, as the loader would hand it over, of random pixels and text states."""
    drawn = torch.Generator().manual_seed(number)
    n, config = spec.micro_batch, spec.config
    shape = (n, config.in_channels, config.image_size, config.image_size)
    batch = Batch(
        torch.randint(256, shape, generator=drawn, dtype=torch.uint8),
        torch.randn(n, TOKENS, config.encoder_dim, generator=drawn).half(),
        torch.arange(n) + n * number,
        torch.ones(n),
    )
    return batch.copy(pin_memory=True) if pin else batch


class Trainer:
    """A net in training: micro_batch() as often as ACCUMULATE, then step(). Fresh ones of a spec are all the same."""

    name = "torch's AdamW"

    def __init__(self, spec: Spec, check: Check) -> None:
        self.spec, self.check, self.device = spec, check, torch.device(check.device)
        torch.manual_seed(0)
        self.diffusion = Diffusion(TIMESTEPS).to(self.device)
        self.net = build(spec.config, check.device, torch.float32, spec.activation, spec.recompute)
        if spec.compiled:
            compile_whole(self.net, check)
        self.start()

    def start(self) -> None:
        """Make what trains the net."""
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    def forward(self, x_t: Tensor, t: Tensor, text_emb: Tensor) -> Tensor:
        """The net's output."""
        return self.net(x_t, t, text_emb)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient."""
        (loss / ACCUMULATE).backward()

    def end_micro_batch(self) -> None:
        """What comes after each micro batch's backward: nothing."""

    def on_device(self, batches: Iterable[Batch]) -> DeviceBatches:
        """The batches as train/loop.py takes them."""
        return DeviceBatches(iter(batches), 0, self.diffusion, self.device)

    def micro_batch(self, batches: DeviceBatches) -> None:
        """What train/loop.py does with the next micro batch, without the sums of the metrics."""
        batch = next(batches)
        x_t = self.diffusion.q_sample(batch.x_start, batch.t, batch.noise)
        output = self.forward(x_t, batch.t, batch.text_emb)
        losses = training_losses(self.diffusion, output, batch.x_start, x_t, batch.t, batch.noise)
        self.backward((losses["loss"] * batch.weight).mean())
        batches.prefetch()
        self.end_micro_batch()

    def step(self) -> None:
        """Move the weights."""
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, first: int, last: int) -> None:
        """The steps from first to last, numbered from 1, each with its own batches."""
        numbers = range(first * ACCUMULATE, (last + 1) * ACCUMULATE)
        batches = self.on_device(make_batch(self.spec, number, self.check.on_gpu) for number in numbers)
        for _ in range(first, last + 1):
            for _ in range(ACCUMULATE):
                self.micro_batch(batches)
            self.step()

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that a resumed training must have again."""
        found = {f"weights/{name}": p.detach().clone() for name, p in self.net.named_parameters()}
        for i, values in self.optimizer.state_dict()["state"].items():
            found |= {f"moments/{i}/{name}": v.clone() for name, v in values.items()}
        return found

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, in a fresh trainer."""
        saved = torch.load(path, map_location=self.device)
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])


class EngineTrainer(Trainer):
    """The same with the project's engine, on one rank, in bfloat16, with its moving average."""

    name = "ZeRO-1, AdamW8bit"

    def start(self) -> None:
        """Join the group of one rank, if that is not done, and wrap the net."""
        from data.config import DataConfig
        from train.config import Config, OptimConfig
        from train.ema import EMA
        from train.engine import build_engine, init_distributed

        if not torch.distributed.is_initialized():
            init_distributed()
        self.config = Config(
            steps=STEPS,
            global_batch=self.spec.micro_batch * ACCUMULATE,
            micro_batch=self.spec.micro_batch,
            recompute=self.spec.recompute,
            data=DataConfig(streams=1),
            model=self.net.config,
            optim=OptimConfig(lr_start=1e-4, lr_peak=1e-3, warmup_steps=10),
        )
        self.engine = build_engine(self.net, self.config, 1)
        self.ema = EMA(self.engine, 0.99)
        self.done = 0

    def forward(self, x_t: Tensor, t: Tensor, text_emb: Tensor) -> Tensor:
        """The engine's."""
        return self.engine(x_t, t, text_emb)

    def backward(self, loss: Tensor) -> None:
        """The engine's; it divides by the number of micro batches."""
        self.engine.backward(loss)

    def end_micro_batch(self) -> None:
        """The engine's step, which it makes after the last of them."""
        self.engine.step()

    def step(self) -> None:
        """The moving average; the engine has stepped with the last micro batch."""
        self.done += 1
        if self.engine.stepped:
            self.ema.update(self.engine, self.done)

    def _parts(self) -> dict[str, Any]:
        return {"master": self.engine.master, "ema": self.ema.average} | {
            f"moments/{name}": value for name, value in self.engine.moments.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Masters, moments, average and weights."""
        weights = {f"weights/{name}": p.detach().clone() for name, p in self.engine.model.named_parameters()}
        return {name: value.detach().clone() for name, value in self._parts().items()} | weights

    def save(self, path: Path) -> None:
        """As train/checkpoint/writer.py: masters, moments and average of this rank, and the place in the schedule."""
        parts = {name: value.detach().cpu() for name, value in self._parts().items()}
        torch.save({"step": self.done, "schedule_step": self.engine.schedule_step, **parts}, path)

    def load(self, path: Path) -> None:
        """As train/checkpoint/resume.py."""
        saved = torch.load(path)
        moments = {name.removeprefix("moments/"): v for name, v in saved.items() if name.startswith("moments/")}
        self.engine.restore(saved["step"], saved["schedule_step"], saved["master"].to(self.device), moments)
        self.ema.average.copy_(saved["ema"])
        self.done = saved["step"]


def make_trainer(spec: Spec, check: Check) -> Trainer:
    """A fresh one, with the project's engine where that can be imported."""
    return (EngineTrainer if has_engine() else Trainer)(spec, check)
