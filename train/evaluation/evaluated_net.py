"""The net that is evaluated: a checkpoint of a run, or released weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.checks import check_choice
from data.text.meta import TextMeta
from model.config import UNetConfig
from model.unet import UNet
from train.checkpoint.post_hoc import open_checkpoint
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


def find_net(
    path: str, model: str, weights: str, embeddings: str, ema_length: float | None = None
) -> EvaluatedNet:  # fmt: skip
    """The checkpoint at a path, or released weights there if `model` names their net, a file of conf/model.

    weights: 'ema' or 'master'.  embeddings: their folder, whose width the net has if its file gives none.
    ema_length: of the average, if it is not the one that the training kept.
    Raises: ValueError.
    """
    if model:
        if ema_length is not None:
            raise ValueError(
                f"ema_length={ema_length:g} is of a run, and model={model} of released weights: leave one out"
            )
        check_choice("model", model, sorted(file.stem for file in MODELS.glob("*.yaml")))
        values = OmegaConf.merge(OmegaConf.structured(UNetConfig), OmegaConf.load(MODELS / f"{model}.yaml"))
        config: UNetConfig = OmegaConf.to_object(values)  # type: ignore[assignment]
        config = replace(config, encoder_dim=config.encoder_dim or TextMeta.read(embeddings).dim)
        if not Path(path).exists():
            raise ValueError(f"no weights at '{Path(path).absolute()}': name a file or folder on this machine")
        load = partial(load_released_net, path, config)
        return EvaluatedNet(config, RELEASED_STEPS, load, f"{path} as {model}", RELEASED_TOKENS, None)
    checkpoint = open_checkpoint(path, ema_length)
    text = checkpoint.text
    return EvaluatedNet(
        checkpoint.model, checkpoint.diffusion_steps, partial(load_net, checkpoint, weights),
        f"{checkpoint.config['run_dir']}, step {checkpoint.step}, {checkpoint.title(weights)}", text.tokens,
        (text.weights_sha256, text.tokenizer_sha256),
    )  # fmt: skip
