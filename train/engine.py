"""DeepSpeed's ZeRO-1, AdamW8bit and OneCycle; the only file that imports deepspeed or bitsandbytes."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model.unet import UNet
from train import adam_state
from train.config import Config, OptimConfig, accumulation
from train.faults.compiler import without_torch_compile
from train.faults.limits import HANG_SECONDS, collective_limit
from train.faults.route import choose_gloo_interface, gloo_reaches_all

with without_torch_compile():
    import bitsandbytes


def init_distributed(hang_seconds: float = HANG_SECONDS) -> tuple[int, int, torch.device]:
    """Join the launcher's process group, or be its only rank where there is no launcher.

    The first rank of each node tells over which interface, if there are several nodes.
    hang_seconds: of the run; how long a rank waits for the others follows from it, in all process groups.
    Returns this process's rank, the number of ranks and the device.
    Raises: ConnectionError if the other ranks cannot be reached.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
    if device.type != "cpu":
        accelerator.set_device(device.index)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that all use every core slow each other down.
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))
    # DeepSpeed would compile an all-reduce for inference, which training never calls. That takes half a minute at the
    # first start, and if it is killed meanwhile it leaves a lock on which every later start waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed makes groups without a limit of their own, which then is torch's: ten minutes with NCCL.
    limit = collective_limit(hang_seconds)
    vars(c10d).update(default_pg_timeout=limit, default_pg_nccl_timeout=limit)
    if (line := choose_gloo_interface()) and os.environ["LOCAL_RANK"] == "0":
        print(line, flush=True)
    backend = "gloo" if device.type == "cpu" else "nccl"
    with gloo_reaches_all():
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
    return dist.get_rank(), dist.get_world_size(), device


def optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit or 32-bit states; decoupled weight decay on every parameter."""
    adamw = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "adamw": torch.optim.AdamW}[config.name]
    return adamw(parameters, lr=config.lr_start, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def quantize(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A moment in 8 bits, as bitsandbytes rounds it: codes, the scale of each block, and the value of each code."""
    table = bitsandbytes.functional.create_dynamic_map(signed=signed)
    codes, state = bitsandbytes.functional.quantize_blockwise(moment, code=table, blocksize=adam_state.BLOCK)
    return codes, state.absmax, table


def one_cycle(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    """The learning rate: lr_start -> lr_peak over the warm-up, then -> lr_end at the last step, both along a cosine.

    Source: Smith & Topin 2018. beta1 stays constant: the model card does not mention cycling it, torch's default.
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
    """The net under ZeRO-1: a rank holds all weights, and its own part of their fp32 masters and moments."""

    engine: deepspeed.DeepSpeedEngine
    scheduler: LRScheduler
    base_optimizer: torch.optim.Optimizer

    @property
    def model(self) -> UNet:
        """The UNet, its weights in the working precision."""
        return self.engine.module

    def __call__(self, x: Tensor, timesteps: Tensor, text_emb: Tensor, *low_res: Tensor) -> Tensor:
        """The net's forward.  low_res: low_res and aug_t of a SuperResolutionUNet."""
        return self.engine(x, timesteps, text_emb, *low_res)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro batch's loss; where the loss is not finite, neither is the gradient."""
        self.engine.backward(loss * (1.0 + 0.0 * loss.detach()))

    def step(self) -> None:
        """Step the optimizer and the schedule if this was the last micro batch of the step."""
        self.engine.step()

    @property
    def stepped(self) -> bool:
        """Whether the last step was taken; all ranks skip it, and the schedule's step, if the norm is not finite."""
        return bool(self.engine.was_step_applied())

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the last step, before clipping."""
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def lr(self) -> float:
        """The learning rate that the next step will use."""
        return float(self.scheduler.get_last_lr()[0])

    @property
    def master(self) -> Tensor:
        """This rank's part of the fp32 masters: all parameters in order, flattened, padded and cut into equal parts."""
        return self.engine.optimizer.single_partition_of_fp32_groups[0]

    @property
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state for this rank's part, see train/adam_state.py; empty before the first step."""
        state = self.base_optimizer.state.get(self.master, {})
        return {name: torch.as_tensor(value) for name, value in state.items()}

    def set_weights(self, weights: dict[str, Tensor] | None) -> None:
        """Set the weights, and the fp32 masters of all ranks, to those of a state dict; a collective call.

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

    @property
    def weights(self) -> Tensor:
        """The trained weights of the model in the working precision, [ranks, elements]: a row for each rank's part."""
        return self.engine.optimizer.bit16_groups_flat[0].view(dist.get_world_size(), -1)

    def before_update(self, call: Callable[[], None]) -> None:
        """Have a function called in each step before the optimizer changes masters and moments."""
        self.base_optimizer.register_step_pre_hook(lambda *_: call())

    def push_master(self) -> None:
        """Set the weights of all ranks to the masters."""
        self.engine.optimizer.update_lp_params()

    @property
    def schedule_step(self) -> int:
        """Steps of the schedule: those of the run without the steps that DeepSpeed skipped for overflow."""
        return int(self.scheduler.last_epoch)

    def fits(self, moments: dict[str, Tensor]) -> bool:
        """Whether these moments are a state of this kind of optimizer."""
        return adam_state.kind(moments) == ("adamw" if self._is_torch_adamw else "adamw8bit")

    def as_moments(self, first: Tensor, second: Tensor, step: int) -> dict[str, Tensor]:
        """The state of this optimizer with these two moments, given in fp32; AdamW8bit rounds them to 8 bits."""
        return adam_state.encode(first, second, step, None if self._is_torch_adamw else quantize)

    @property
    def _is_torch_adamw(self) -> bool:
        return isinstance(self.base_optimizer, torch.optim.AdamW)

    def restore(self, step: int, schedule_step: int, master: Tensor, moments: dict[str, Tensor]) -> None:
        """Go on from a step with these masters and moments."""
        self.master.data.copy_(master)
        self.push_master()
        if moments:
            self.base_optimizer.state[self.master] = adam_state.for_optimizer(moments, self.master.device)
        # Not by the schedule's own state dict, which would bring back the number of steps of the earlier configuration.
        self.scheduler.last_epoch = schedule_step - 1
        with warnings.catch_warnings():
            # It is right here: the steps of the optimizer that came before were made by an earlier process.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            self.scheduler.step()
        self.engine.global_steps = step


def zero_1(unet: nn.Module) -> dict[str, object]:
    """DeepSpeed's ZeRO stage 1: gradients are all-reduced by bucket while the backward goes on.

    A bucket holds the largest parameter and no more: a larger one is full later, and two of them are in memory.
    """
    largest = max(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    # With reduce_scatter, stage 1 would all-reduce all the same, but a copy of the bucket.
    return {"stage": 1, "overlap_comm": True, "reduce_scatter": False, "reduce_bucket_size": largest}


def build_engine(unet: UNet, config: Config, ranks: int) -> Engine:
    """Wrap a net that is on its device for training."""
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
            "zero_optimization": zero_1(unet),
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            # DeepSpeed's default for bf16, fp32, would keep a whole fp32 gradient on every GPU.
            "data_types": {"grad_accum_dtype": "bf16" if bf16 else "fp32"},
            "steps_per_print": None,
            # It would wait for the device twice a micro batch.
            "timers": {"throughput": {"enabled": False}},
        },
    )
    assert isinstance(wrapped, DeepSpeedZeroOptimizer), type(wrapped)
    return Engine(engine, scheduler, base)
