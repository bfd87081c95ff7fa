"""A run in words, and its number of parameters."""

from data.checks import count
from data.loader.dataset import Dataset
from data.loader.held_out import micro_batches
from data.loader.mixture import share_out
from data.storage.caption_fields import TXT
from train.compose import sizes_to_set
from train.config import Config, accumulation, summed_in
from train.evaluation.validation import TIMESTEPS
from train.inputs import Inputs, resolve_text_shape
from train.monitor.rank_memory import describe_memory
from train.monitor.run_time import describe_time
from train.weights.lora import unet_on_meta


def parameters(config: Config) -> tuple[int, int]:
    """Number of parameters that are trained, and of those that are frozen; takes no memory for them."""
    unet = unet_on_meta(config.model, config.lora)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in unet.parameters()) - trained


def _samples(dataset: Dataset) -> str:
    return f"{count(dataset.samples, 'sample')}{' chosen' if dataset.selection else ''}"


def describe(config: Config, ranks: int, inputs: Inputs | None) -> str:
    """The resolved run in a few lines.  inputs: what was found; None if it is not there.

    Raises: ValueError if the ranks don't fit the batch, or without data the width of the embeddings or a size that
    follows the data is not known.
    """
    if unset := sizes_to_set(config):
        raise ValueError(f"{', '.join(unset)} follow the number of samples, which is not known without the data")
    if inputs:
        sizes = share_out(config.global_batch, [dataset.weight for dataset in inputs.datasets])
        data = "; ".join(
            f"{count(len(found.shards), 'shard')}, {_samples(found)} in {given.shards}, "
            f"{size} of each batch, {config.steps * size / found.samples:.2f} epochs"
            for found, given, size in zip(inputs.datasets, config.data.datasets(), sizes, strict=True)
        )
        meta = inputs.meta
        source = f"computed online in {meta.compute}, as" if inputs.encoder else f"{meta.dtype} in"
        folders = ", ".join(dataset.text for dataset in inputs.datasets)
        text = f"{meta.encoder}, {meta.tokens} x {meta.dim}, {source} {folders}"
    else:
        data, text = "none usable yet", "-"
        if resolve_text_shape(config):
            text = f"{config.data.tokens} x {config.model.encoder_dim} assumed, as T5-XXL's"
    accumulate, optim = accumulation(config, ranks), config.optim
    variance = "learned" if config.model.learn_sigma else "fixed"
    trained, frozen = parameters(config)
    enlarges = f"{config.model.low_res_size} -> " if config.model.low_res_size else ""
    beside = f" of LoRA, rank {config.lora.rank}, beside {frozen:,} that are frozen" if frozen else ""
    lines = {
        "run": config.run_dir,
        "global batch": f"{count(ranks, 'rank')} x {config.micro_batch} micro batch x {accumulate} accumulation "
        f"= {config.global_batch}{summed_in(config, accumulate)}",
        "model": f"{trained:,} parameters{beside}, {enlarges}{config.model.image_size} px, {config.precision}",
        "begins with": config.init_from or "random weights",
        "diffusion": f"{config.diffusion_steps} steps, cosine betas, {variance} variance",
        "steps": f"{config.steps:,}, {config.steps * config.global_batch:,} images",
        "lr": f"{optim.lr_start:g} -> {optim.lr_peak:g} in {optim.warmup_steps:,} steps -> {optim.lr_end:g}, "
        "OneCycle cosine",
        "optimizer": f"{optim.name}, ZeRO-1, betas {tuple(optim.betas)}, decay {optim.weight_decay:g}, "
        f"clip {optim.grad_clip:g}",
        "captions": f"{config.data.tokens} tokens, {config.data.cond_drop_prob:.0%} dropped to the empty one"
        f"{_shares(config)}",
        "data": data,
        "embeddings": text,
        "validation": describe_validation(config, ranks, inputs),
    }
    return f"{_as_lines(lines)}\n{describe_cost(config, ranks, inputs)}"


def describe_cost(config: Config, ranks: int, inputs: Inputs | None) -> str:
    """The memory that a run needs and the time that it will take on this machine, a line each.

    Raises: ValueError if the ranks don't fit the batch.
    """
    memory = describe_memory(config, ranks, *parameters(config))
    return _as_lines(memory | {"time": describe_time(config, *forwards_beside(config, inputs))})


def forwards_beside(config: Config, inputs: Inputs | None) -> tuple[int, int]:
    """Passes of an image through the net for the run's sample grids and for its validations, without a backward."""
    sample, every = config.sample, config.validate_every
    prompts = sample.prompts if isinstance(sample.prompts, int) else len(sample.prompts)
    # With guidance the net sees each image twice.
    of_grid = prompts * sample.steps * sum(1 if scale == 1 else 2 for scale in sample.guidance_scales)
    grids = -(-config.steps // sample.every) if sample.every else 1
    validations = -(-config.steps // every) if every else 0
    return of_grid * grids, TIMESTEPS * held_out_samples(config, inputs) * validations


def held_out_samples(config: Config, inputs: Inputs | None) -> int:
    """Samples of a validation. Without inputs those that are asked for are taken to be there."""
    asked = config.data.validation.samples
    return min(asked, sum(dataset.samples for dataset in inputs.held_out)) if inputs else asked


def _as_lines(values: dict[str, str]) -> str:
    return "\n".join(f"{name:>13}  {value}" for name, value in values.items())


def describe_validation(config: Config, ranks: int, inputs: Inputs | None) -> str:
    """When a run validates, on what, and what that costs. Without inputs the samples are taken to be there."""
    given, every = config.data.validation, config.validate_every
    if not every:
        return f"none: validate_every=0{f', {given.shards} is not looked at' if given.shards else ''}"
    samples = held_out_samples(config, inputs)
    forwards = TIMESTEPS * micro_batches(samples, config.micro_batch, ranks)
    return (
        f"{count(samples, 'sample')} of {given.shards or 'those held apart'} every {every:,} steps, at {TIMESTEPS} "
        f"timesteps: {forwards:,} forward passes on each rank, "
        f"{validation_share(config, samples):.2%} of the training's FLOP"
    )


def validation_share(config: Config, samples: int) -> float:
    """The FLOP of all validations over those of the training, whose backward takes twice its forward's."""
    return TIMESTEPS * samples / (3 * config.global_batch * config.validate_every)


def _shares(config: Config) -> str:
    """How often each of several captions is drawn; '' for txt alone."""
    captions = config.data.captions
    if [caption.field for caption in captions] == [TXT]:
        return ""
    total = sum(caption.weight for caption in captions)
    return "; " + ", ".join(f"{caption.field} {caption.weight / total:.1%}" for caption in captions)
