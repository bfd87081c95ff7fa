"""DeepSpeed ZeRO-1, AdamW8bit and OneCycle: the only file that knows deepspeed or bitsandbytes."""

import os
from dataclasses import dataclass

import bitsandbytes
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model.unet import UNet
from train.checkpoint.reader import BLOCK
from train.config import Config, OptimConfig, accumulation

# bitsandbytes' own default: a tensor of fewer elements keeps 32-bit states.
FEWEST_8BIT = 4096


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes, or be the only rank; returns rank, ranks and the device."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
    if device.type != "cpu":
        accelerator.set_device(device.index)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core stand in each other's way.
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))
    # DeepSpeed would compile an all-reduce for inference that no training calls: half a minute at the first start, and
    # if that is killed it leaves a lock on which every later start waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size(), device


def optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit or 32-bit states; decoupled weight decay on every parameter."""
    adamw = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "adamw": torch.optim.AdamW}[config.name]
    return adamw(parameters, lr=config.lr_start, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def one_cycle(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    """lr_start -> lr_peak over the warm-up, then -> lr_end at the last step, both along a cosine.

    By default torch would cycle Adam's beta1 with the learning rate too; the card says nothing of it, so it stays.
    """
    return OneCycleLR(
        optimizer,
        max_lr=config.lr_peak,
        total_steps=steps,
        pct_start=config.warmup_steps / steps,
        anneal_strategy="cos",
        div_factor=config.lr_peak / config.lr_start,
        final_div_factor=config.lr_start / config.lr_end,
        cycle_momentum=False,
    )


@dataclass(slots=True)
class Engine:
    """The model under ZeRO-1: this rank holds all weights, and its own part of their fp32 masters and moments."""

    engine: deepspeed.DeepSpeedEngine
    scheduler: LRScheduler
    base_optimizer: torch.optim.Optimizer

    @property
    def model(self) -> UNet:
        """The UNet in the weights' working precision."""
        return self.engine.module

    def __call__(self, x: Tensor, timesteps: Tensor, text_emb: Tensor) -> Tensor:
        """The UNet's forward."""
        return self.engine(x, timesteps, text_emb)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro batch's loss; one that is not finite makes the gradient so."""
        self.engine.backward(loss * (1.0 + 0.0 * loss.detach()))

    def step(self) -> None:
        """The optimizer and the schedule, if this was the last micro batch of the step."""
        self.engine.step()

    @property
    def stepped(self) -> bool:
        """Whether the last step was made; all ranks skip it, and its place in the schedule, for a norm not finite."""
        return bool(self.engine.was_step_applied())

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping, of the last step."""
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def lr(self) -> float:
        """The learning rate that the next step will use."""
        return float(self.scheduler.get_last_lr()[0])

    @property
    def master(self) -> Tensor:
        """This rank's part of the fp32 masters, which are the parameters in order, flat, padded and cut equally."""
        return self.engine.optimizer.single_partition_of_fp32_groups[0]

    @property
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state for this rank's part, by its library's own names; empty before the first step."""
        state = self.base_optimizer.state.get(self.master, {})
        return {name: torch.as_tensor(value) for name, value in state.items()}

    def set_weights(self, weights: dict[str, Tensor] | None) -> None:
        """Make the masters of all ranks, in fp32, and the weights those of a state dict; a collective call.

        weights: needed on rank 0 alone.
        """
        size, flat = self.master.numel(), torch.empty(0)
        if weights:
            flat = torch.cat([weights[name].float().flatten() for name, _ in self.model.named_parameters()])
        for rank in range(dist.get_world_size()):
            part = torch.zeros_like(self.master)
            own = flat[rank * size : (rank + 1) * size]
            part[: own.numel()] = own
            dist.broadcast(part, src=0)
            if rank == dist.get_rank():
                self.master.data.copy_(part)
        self.push_master()

    def push_master(self) -> None:
        """Make the weights of all ranks those of the masters."""
        self.engine.optimizer.update_lp_params()

    @property
    def schedule_step(self) -> int:
        """Steps of the schedule; fewer than those of the run where DeepSpeed skipped some for overflow."""
        return int(self.scheduler.last_epoch)

    def fits(self, moments: dict[str, Tensor]) -> bool:
        """Whether these are moments of this optimizer, of a part cut like this rank's."""
        names = {"exp_avg"} if isinstance(self.base_optimizer, torch.optim.AdamW) else {"state1"}
        return names <= moments.keys()

    def as_moments(self, first: Tensor, second: Tensor, step: int) -> dict[str, Tensor]:
        """Adam's two moments in fp32, of this rank's part, as this optimizer keeps them: 8-bit states are rounded."""
        count = torch.tensor(step)
        if isinstance(self.base_optimizer, torch.optim.AdamW):
            return {"step": count.float(), "exp_avg": first, "exp_avg_sq": second}
        state = {"step": count, "state1": first, "state2": second}
        if first.numel() < FEWEST_8BIT:
            return state
        for which, moment in ((1, first), (2, second)):
            code = bitsandbytes.functional.create_dynamic_map(signed=which == 1)
            rounded, scale = bitsandbytes.functional.quantize_blockwise(moment, code=code, blocksize=BLOCK)
            state |= {f"state{which}": rounded, f"absmax{which}": scale.absmax, f"qmap{which}": code}
        return state

    def restore(self, step: int, schedule_step: int, master: Tensor, moments: dict[str, Tensor]) -> None:
        """Go on from a step with these masters and moments."""
        self.master.data.copy_(master)
        self.push_master()
        # bitsandbytes keeps its step as an int, torch as a tensor.
        state = {
            name: v.to(self.master.device) if v.ndim else int(v) if v.dtype == torch.int64 else v
            for name, v in moments.items()
        }
        if state:
            self.base_optimizer.state[self.master] = state
        # OneCycle with the horizon of this run's configuration; its own state dict would bring back the old one.
        self.scheduler.last_epoch = schedule_step - 1
        self.scheduler.step()
        self.engine.global_steps = step


def build_engine(unet: UNet, config: Config, ranks: int) -> Engine:
    """Wrap the net, placed on its device, for training."""
    bf16 = config.precision == "bf16"
    base = optimizer([p for p in unet.parameters() if p.requires_grad], config.optim)
    scheduler = one_cycle(base, config.optim, config.steps)
    engine, wrapped, _, _ = deepspeed.initialize(
        model=unet,
        optimizer=base,
        lr_scheduler=scheduler,
        config={
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": config.micro_batch,
            "gradient_accumulation_steps": accumulation(config, ranks),
            "gradient_clipping": config.optim.grad_clip,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            # The other choice of DeepSpeed, fp32, would keep a full fp32 gradient on every GPU.
            "data_types": {"grad_accum_dtype": "bf16" if bf16 else "fp32"},
            "steps_per_print": None,
        },
    )
    assert isinstance(wrapped, DeepSpeedZeroOptimizer), type(wrapped)
    return Engine(engine, scheduler, base)
