"""The net that is evaluated: a checkpoint of a run, or released weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.checks import check_choice
from data.text.meta import TextMeta
from model.config import UNetConfig
from model.unet import UNet
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.post_hoc import with_averages
from train.weights.pretrained import pinned_weights
from train.weights.trained_net import load_net, load_released_net

# Diffusion steps and tokens of a caption in IF's own training.
RELEASED_STEPS, RELEASED_TOKENS = 1000, 77
MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"


@dataclass(slots=True)
class EvaluatedNet:
    """What is evaluated, before its weights are read.

    load: reads them, to a device.  description: in one line.  tokens: of a caption.  encoder: hashes of the weights and
    of the tokenizer of the text encoder of its training, None for released weights.
    """

    config: UNetConfig
    diffusion_steps: int
    load: Callable[[torch.device], UNet]
    description: str
    tokens: int
    encoder: tuple[str, str] | None


def open_nets(path: str, model: str, ema_lengths: Sequence[float]) -> list[Checkpoint] | list[str]:
    """The intact checkpoint at a path, for each length of the average if some are given.

    With `model`, the net of released weights, where these are, on the hub with the commit.
    Raises: ValueError if one of them is not there, damaged, or cannot be made.
    """
    if not model:
        checkpoint = Checkpoint.open(path)
        made = with_averages(checkpoint, ema_lengths) if ema_lengths else [checkpoint]
        for one in made:
            one.check_intact()
        return made
    if ema_lengths:
        raise ValueError(
            f"ema_length={ema_lengths[0]:g} is of a run, and model={model} of released weights: leave one out"
        )
    check_choice("model", model, sorted(file.stem for file in MODELS.glob("*.yaml")))
    return [pinned_weights(path)]


def find_net(opened: Checkpoint | str, model: str, weights: str, embeddings: str) -> EvaluatedNet:
    """One of open_nets.

    weights: 'ema' or 'master'.  embeddings: their folder, whose width the net has if its file gives none.
    Raises: ValueError.
    """
    if isinstance(opened, str):
        values = OmegaConf.merge(OmegaConf.structured(UNetConfig), OmegaConf.load(MODELS / f"{model}.yaml"))
        config: UNetConfig = OmegaConf.to_object(values)  # type: ignore[assignment]
        config = replace(config, encoder_dim=config.encoder_dim or TextMeta.read(embeddings).dim)
        load = partial(load_released_net, opened, config)
        return EvaluatedNet(config, RELEASED_STEPS, load, f"{opened} as {model}", RELEASED_TOKENS, None)
    checkpoint, text = opened, opened.text
    return EvaluatedNet(
        checkpoint.model, checkpoint.diffusion_steps, partial(load_net, checkpoint, weights),
        f"{checkpoint.config['run_dir']}, step {checkpoint.step}, {checkpoint.title(weights)}", text.tokens,
        (text.weights_sha256, text.tokenizer_sha256),
    )  # fmt: skip
