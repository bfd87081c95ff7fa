"""The typed configuration of a run, and the checks that go across its fields."""

from dataclasses import dataclass, field

from data.config import DataConfig, TextConfig
from data.loader.mixture import share_out
from model.unet import UNetConfig


@dataclass(slots=True)
class OptimConfig:
    """AdamW and the OneCycle cosine schedule; lr per optimizer step.

    name: 'adamw8bit' (bitsandbytes) or 'adamw' (torch).  grad_clip: largest norm of the whole gradient, 0 for none.
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


@dataclass(slots=True)
class SampleConfig:
    """The sample grids of a run: prompts are captions of its data.

    every: steps between grids, 0 for one at the end alone.  steps: sampler steps.  guidance_scales: a row for each.
    """

    every: int = 0
    prompts: int = 8
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 4.0, 7.0])
    steps: int = 50


@dataclass(slots=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case.  mode: online, offline or disabled."""

    mode: str = "online"
    project: str = "if-stage1"


@dataclass(slots=True)
class LoRAConfig:
    """Fine-tuning of low-rank matrices beside the attention's projections, the net itself frozen (Hu et al. 2021).

    rank: 0 trains the whole net.  alpha: what is learned is scaled by alpha / rank.
    """

    rank: int = 0
    alpha: float = 8.0


@dataclass(slots=True)
class Config:
    """One run.

    micro_batch: samples of one forward on one rank; accumulation follows from global_batch and the ranks.
    diffusion_steps: T.  precision: 'bf16' or 'fp32'.  *_every: in optimizer steps.
    keep_checkpoints: the latest so many are kept, and of the older ones each keep_every-th step, 0 for none.
    init_from: weights to begin with, see train/weights/pretrained.py; none: random. Of no effect where run_dir
    has a checkpoint to go on from.
    max_skipped: steps in a row without a finite loss and gradient, each of them skipped, that end the run.
    hang_seconds: without a micro batch made, until a rank prints its stacks and ends; above the 540 s that the loader
    waits for storage, below the 600 s of the collectives' own limit, which tells less.
    compile: torch.compile for the net, which takes minutes at the start; meant for GPUs, where it fuses what lies
    between convolutions.
    """

    run_dir: str = "runs/run"
    init_from: str = ""
    seed: int = 0
    steps: int = 2_420_000
    global_batch: int = 3072
    micro_batch: int = 6
    diffusion_steps: int = 1000
    precision: str = "bf16"
    compile: bool = False
    ema_decay: float = 0.9999
    log_every: int = 50
    save_every: int = 1000
    keep_checkpoints: int = 3
    keep_every: int = 0
    max_skipped: int = 20
    hang_seconds: int = 570
    dry_run: bool = False
    model: UNetConfig = field(default_factory=UNetConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def accumulation(config: Config, ranks: int) -> int:
    """Micro batches per rank and optimizer step: global_batch / (ranks x micro_batch).

    Raises: ValueError if it is not a whole number.
    """
    whole, rest = divmod(config.global_batch, ranks * config.micro_batch)
    if rest or not whole:
        fitting = [m for m in range(1, config.global_batch // ranks + 1) if config.global_batch % (ranks * m) == 0]
        remedy = (
            f"micro_batch={min(fitting, key=lambda m: abs(m - config.micro_batch))} would fit {ranks} ranks"
            if fitting
            else f"no micro_batch fits {ranks} ranks; take a number of ranks that divides {config.global_batch}"
        )
        raise ValueError(
            f"global_batch={config.global_batch} is not a multiple of {ranks} ranks x "
            f"micro_batch={config.micro_batch}: {remedy}"
        )
    return whole


def check(config: Config) -> None:
    """Look for values that cannot be or that clash.

    Raises: ValueError naming the values and what to change.
    """
    positive = (
        "steps",
        "global_batch",
        "micro_batch",
        "diffusion_steps",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "max_skipped",
        "hang_seconds",
    )
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    for name, value, allowed in (
        ("precision", config.precision, ("bf16", "fp32")),
        ("optim.name", config.optim.name, ("adamw8bit", "adamw")),
        ("text.mode", config.text.mode, ("stored", "online")),
        ("wandb.mode", config.wandb.mode, ("online", "offline", "disabled")),
        ("data.unreadable_shard", config.data.unreadable_shard, ("skip", "fail")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value} must be one of {', '.join(allowed)}")
    for name, share in (
        ("data.cond_drop_prob", config.data.cond_drop_prob),
        ("data.max_bad_share", config.data.max_bad_share),
        ("ema_decay", config.ema_decay),
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1")
    at_least: tuple[tuple[str, float, int], ...] = (
        ("seed", config.seed, 0),
        ("data.workers", config.data.workers, 0),
        ("data.phases", config.data.phases, 1),
        ("data.shuffle_block", config.data.shuffle_block, 1),
        ("data.crop_shift", config.data.crop_shift, 0),
        ("keep_every", config.keep_every, 0),
        ("sample.every", config.sample.every, 0),
        ("sample.prompts", config.sample.prompts, 1),
        ("sample.steps", config.sample.steps, 2),
        ("optim.grad_clip", config.optim.grad_clip, 0),
        ("lora.rank", config.lora.rank, 0),
    )
    for name, number, least in at_least:
        if number < least:
            raise ValueError(f"{name}={number} must be at least {least}")
    if not config.sample.guidance_scales or min(config.sample.guidance_scales) < 0:
        raise ValueError(
            f"sample.guidance_scales={list(config.sample.guidance_scales)} must be one or more numbers from 0 on"
        )
    if config.lora.rank and not config.init_from:
        raise ValueError(f"lora.rank={config.lora.rank} adds to a trained net: name its weights in init_from")
    if config.sample.steps > config.diffusion_steps:
        raise ValueError(f"sample.steps={config.sample.steps} must be at most diffusion_steps={config.diffusion_steps}")
    optim = config.optim
    if not 0 < optim.lr_end <= optim.lr_start <= optim.lr_peak:
        raise ValueError(
            f"optim.lr_end={optim.lr_end} <= optim.lr_start={optim.lr_start} <= optim.lr_peak={optim.lr_peak} "
            "does not hold: OneCycle rises from the start to the peak and falls to the end"
        )
    if not 1 < optim.warmup_steps < config.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} must lie between 2 and steps={config.steps} - 1: "
            "change one of them"
        )
    share_out(config.global_batch, [dataset.weight for dataset in config.data.datasets()])
    if not 1 <= config.data.streams <= config.global_batch:
        raise ValueError(
            f"data.streams={config.data.streams} must lie between 1 and global_batch={config.global_batch}"
        )
