"""The typed configuration of a run. Imports no torch, so that it is read and checked at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.checks import FROM_DATA, check_at_least, check_choice, check_share, check_size, count
from data.cli import location
from data.config import DataConfig, TextConfig
from data.loader.mixture import share_out
from model.config import LAYOUTS, RECOMPUTE, UNetConfig
from train.faults.limits import HANG_SECONDS

CODE = Path(__file__).resolve().parent.parent
# A sum of more bf16 gradients drifts: where all are alike it is 0.3 % too small at 64, and 28 % at 512
# (tests/test_accumulation.py).
MOST_BF16_SUMMANDS = 64


@dataclass(slots=True)
class OptimConfig:
    """AdamW with the OneCycle cosine schedule; learning rates are per optimizer step.

    name: adamw8bit (bitsandbytes) or adamw (torch).
    lr_start: learning rate of the first step.
    lr_peak: learning rate at the end of the warm-up.
    lr_end: learning rate of the last step.
    warmup_steps: steps from lr_start to lr_peak; -1 follows the steps.
    betas: decay of the two moments.
    eps: added to the square root of the second moment.
    weight_decay: decoupled, relative to the learning rate.
    grad_clip: largest norm of the whole gradient; 0 does not clip.
    """

    name: str = "adamw8bit"
    lr_start: float = 2e-6
    lr_peak: float = 5e-5
    lr_end: float = 5e-9
    warmup_steps: int = 10_000
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, ("adamw8bit", "adamw"))
        check_size("optim.warmup_steps", self.warmup_steps, 2)
        check_at_least("optim.grad_clip", self.grad_clip, 0)
        if not 0 < self.lr_end <= self.lr_start <= self.lr_peak:
            raise ValueError(
                f"optim.lr_end={self.lr_end} <= optim.lr_start={self.lr_start} <= optim.lr_peak={self.lr_peak} "
                "does not hold: OneCycle rises from the start to the peak and falls to the end"
            )


@dataclass(slots=True)
class SampleConfig:
    """The sample grids of a run.

    every: steps between grids; 0 for one at the end alone, -1 follows the steps.
    prompts: how many captions of the data are drawn, or a list of captions of your own. text.encoder, or the encoder
        that the embeddings' meta.json names, encodes your own before the start.
    guidance_scales: classifier-free guidance, a row of the grid for each.
    steps: steps of the sampler.
    """

    every: int = 0
    prompts: Any = 8  # int | list[str], a union that OmegaConf does not have
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 4.0, 7.0])
    steps: int = 50

    def __post_init__(self) -> None:
        check_size("sample.every", self.every, 0)
        if isinstance(self.prompts, int):
            check_at_least("sample.prompts", self.prompts, 1)
        elif not isinstance(self.prompts, list) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"sample.prompts={self.prompts} must be a whole number, or a list of captions of your own")
        elif not self.prompts:
            raise ValueError("sample.prompts=[] has no caption: give some, or a number of captions of the data")
        check_at_least("sample.steps", self.steps, 2)
        if not self.guidance_scales or min(self.guidance_scales) < 0:
            raise ValueError(
                f"sample.guidance_scales={list(self.guidance_scales)} must be one or more numbers from 0 on"
            )


@dataclass(slots=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case.

    mode: online, offline or disabled.
    project: name of the project there.
    """

    mode: str = "online"
    project: str = "if-stage1"

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass(slots=True)
class LoRAConfig:
    """Fine-tuning of low-rank matrices beside the attention's projections; the net is frozen (Hu et al. 2021).

    rank: rank of the matrices; 0 trains the whole net instead.
    alpha: what the matrices add is scaled by alpha / rank.
    """

    rank: int = 0
    alpha: float = 8.0

    def __post_init__(self) -> None:
        check_at_least("lora.rank", self.rank, 0)


@dataclass(slots=True)
class Config:
    """One run.

    run_dir: folder for the run's checkpoints, metrics and samples. If it has a checkpoint, the run resumes from the
        latest one. It must not be the folder of this code.
    init_from: weights to begin with, a file or folder as docs/guide/export.md lists them, or ORG/NAME@REVISION on the
        hub; default: random weights. It has no effect once run_dir has a checkpoint.
    seed: seed of every random draw.
    steps: optimizer steps of the whole run; -1 follows the number of samples, by the rule of train/compose.py, which
        holds for the other keys that may be -1 too. docs/guide/own_pictures.md.
    global_batch: samples of an optimizer step, over all ranks.
    micro_batch: samples of one forward on one rank; accumulation follows from global_batch and the ranks; with
        bf16 the accumulation is at most 64, see docs/recipe.md.
    diffusion_steps: T, the timesteps of the diffusion.
    precision: bf16 or fp32.
    recompute: what backward computes again to save memory: none, cheap (norms, activations, copies) or blocks
        (everything inside the blocks); the gradients are the same. docs/measurements/benchmarks.md.
    layout: of the activations in memory, nchw or nhwc, which the bf16 convolutions of NVIDIA's GPUs want; it changes
        rounding alone. nhwc needs compile=true. docs/measurements/benchmarks.md.
    compile: torch.compile for the net; takes minutes at the start, and saves time on GPUs. Needs g++, or gcc for a GPU.
    ema_decay: decay per step of the weights' exponential moving average.
    ema_snapshot_every: optimizer steps between snapshots of two power-function averages, of which averages of any
        length are made after the run. They are never removed. 0 keeps no such averages. docs/guide/sampling.md.
    log_every: optimizer steps between lines of metrics.
    save_every: optimizer steps between checkpoints; -1 follows the steps.
    validate_every: optimizer steps between validations, by the average of the weights on the samples of
        data.validation; there is one at the end too. 0 makes none, -1 follows the steps where there are such samples.
    keep_checkpoints: number of newest checkpoints that are kept.
    keep_every: also keep every checkpoint whose step is a multiple of this; 0 keeps none.
    max_skipped: the run ends after so many steps in a row without a finite loss and gradient; each is skipped.
    check_every: optimizer steps between checks of the ranks by one another: all compute one micro batch again, and
        weights, masters and moments are compared, as also before each checkpoint. 0 makes none.
        docs/measurements/corruption.md.
    on_spike: after a step whose mse or gradient norm leaps: tell, or rollback to the last checkpoint and on from there
        without the batch of that step. docs/reference/checkpoints.md.
    spike_factor: a value is a spike where it is above the median of the steps before by so many standard deviations.
    max_rollbacks: the run ends at a spike after so many rollbacks.
    hang_seconds: a rank that makes no micro batch for so long prints its stacks and ends. All other limits are
        multiples of it: docs/reference/checkpoints.md.
    needs_gpu: a training without a GPU is refused, unless DS_ACCELERATOR=cpu is set. Where there is a GPU that torch
        cannot use, it is refused in any case.
    dry_run: check everything, say what would run and the memory that it needs, and leave; status 2 if it cannot run.
    model: the shape of the net.
    lora: fine-tuning of low-rank matrices.
    data: where the samples lie and how they are read.
    text: where text embeddings come from.
    optim: the optimizer and its schedule.
    sample: the sample grids.
    wandb: Weights & Biases.
    tensorboard: write the metrics and sample grids for TensorBoard too, into RUN_DIR/tensorboard; it needs the package
        (pip install tensorboard).
    """

    run_dir: str = location("runs/run")
    init_from: str = location("")
    seed: int = 0
    steps: int = 2_420_000
    global_batch: int = 3072
    micro_batch: int = 6
    diffusion_steps: int = 1000
    precision: str = "bf16"
    recompute: str = "none"
    layout: str = "nchw"
    compile: bool = False
    ema_decay: float = 0.9999
    ema_snapshot_every: int = 0
    log_every: int = 50
    save_every: int = 1000
    validate_every: int = 0
    keep_checkpoints: int = 3
    keep_every: int = 0
    max_skipped: int = 20
    check_every: int = 200
    on_spike: str = "tell"
    spike_factor: float = 20.0
    max_rollbacks: int = 10
    hang_seconds: int = HANG_SECONDS
    needs_gpu: bool = False
    dry_run: bool = False
    model: UNetConfig = field(default_factory=UNetConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_run_dir(self.run_dir)
        for name in ("steps", "save_every"):
            check_size(name, getattr(self, name), 1)
        for name in ("global_batch", "micro_batch", "diffusion_steps", "log_every", "keep_checkpoints", "max_skipped",
                     "hang_seconds"):  # fmt: skip
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        for name in ("ema_snapshot_every", "keep_every", "check_every"):
            check_at_least(name, getattr(self, name), 0)
        check_size("validate_every", self.validate_every, 0)
        if self.validate_every > 0 and not (self.data.validation.shards or self.data.validation.share):
            raise ValueError(
                f"validate_every={self.validate_every} needs held-out samples: name them in data.validation.shards and "
                "their embeddings in data.validation.text, or hold a share apart with data.validation.share"
            )
        check_choice("on_spike", self.on_spike, ("tell", "rollback"))
        check_at_least("spike_factor", self.spike_factor, 1)
        check_at_least("max_rollbacks", self.max_rollbacks, 1)
        check_choice("precision", self.precision, ("bf16", "fp32"))
        check_choice("recompute", self.recompute, RECOMPUTE)
        check_choice("layout", self.layout, LAYOUTS)
        if self.layout == "nhwc" and not self.compile:
            raise ValueError("layout=nhwc needs compile=true: without it each norm takes many passes over memory")
        if self.model.low_res_size and isinstance(self.sample.prompts, list):
            raise ValueError(
                "sample.prompts are captions of your own, which have no images that a net of the second stage could "
                "enlarge: give a number of captions of the data"
            )
        check_share("ema_decay", self.ema_decay)
        if self.lora.rank and not self.init_from:
            raise ValueError(f"lora.rank={self.lora.rank} adds to a trained net: name its weights in init_from")
        if self.sample.steps > self.diffusion_steps:
            raise ValueError(f"sample.steps={self.sample.steps} must be at most diffusion_steps={self.diffusion_steps}")
        if self.optim.warmup_steps >= self.steps != FROM_DATA:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must lie between 2 and {self.steps - 1}, "
                f"one less than steps={self.steps}: change one of them"
            )
        if self.data.streams > self.global_batch:
            raise ValueError(
                f"data.streams={self.data.streams} must lie between 1 and global_batch={self.global_batch}"
            )
        share_out(self.global_batch, [dataset.weight for dataset in self.data.datasets()])


def check_run_dir(run_dir: str) -> None:
    """Raises: ValueError if it is empty, or the folder of this code, which would fill with the files of a run."""
    if not run_dir.strip():
        raise ValueError("run_dir= is empty: give the folder of the run, or leave the key out")
    if Path(run_dir).resolve() == CODE:
        raise ValueError(f"run_dir={run_dir} is the folder of the code itself: give the run a folder of its own")


def accumulation(config: Config, ranks: int) -> int:
    """Micro batches per rank and optimizer step: global_batch / (ranks x micro_batch).

    Raises: ValueError if it is not a whole number.
    """
    whole, rest = divmod(config.global_batch, ranks * config.micro_batch)
    if rest or not whole:
        fitting = [m for m in range(1, config.global_batch // ranks + 1) if config.global_batch % (ranks * m) == 0]
        remedy = (
            f"micro_batch={min(fitting, key=lambda m: abs(m - config.micro_batch))} would fit {count(ranks, 'rank')}"
            if fitting
            else f"no micro_batch fits {ranks} ranks; take a number of ranks that divides {config.global_batch}"
        )
        raise ValueError(
            f"global_batch={config.global_batch} is not a multiple of {count(ranks, 'rank')} x "
            f"micro_batch={config.micro_batch}: {remedy}"
        )
    return whole


def check_accumulation(config: Config, ranks: int) -> None:
    """Raises: ValueError, as accumulation, or if so many micro batches would be added up wrongly in bf16."""
    whole = accumulation(config, ranks)
    if config.precision == "bf16" and whole > MOST_BF16_SUMMANDS:
        of_rank = config.global_batch // ranks
        fits = next(m for m in range(-(-of_rank // MOST_BF16_SUMMANDS), of_rank + 1) if of_rank % m == 0)
        all_micro = config.global_batch // config.micro_batch
        least = next(r for r in range(-(-all_micro // MOST_BF16_SUMMANDS), all_micro + 1) if all_micro % r == 0)
        raise ValueError(
            f"global_batch={config.global_batch} on {count(ranks, 'rank')} x micro_batch={config.micro_batch} adds up "
            f"the gradients of {whole} micro batches in bf16: at most {MOST_BF16_SUMMANDS}, for the sum of more is too "
            f"small, by 0.3 % at 64 and up to 28 % at 512. Take {least} ranks, micro_batch={fits} or precision=fp32"
        )


def summed_in(config: Config, accumulated: int) -> str:
    """Says in what precision so many micro batches are added up, and of how many that is right; '' for one of them."""
    if accumulated == 1 or config.precision == "fp32":
        return ""
    return f"; gradients are added up in bf16, of at most {MOST_BF16_SUMMANDS} micro batches"
