"""The net that is evaluated: a checkpoint of a run, or released weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.text.meta import TextMeta
from model.config import UNetConfig
from model.unet import UNet
from train.weights.pretrained import load_pretrained, read_trained

RELEASED_STEPS = 1000


@dataclass(slots=True)
class Net:
    """What is judged: how to load it, what it was trained with, and in one line which it is."""

    config: UNetConfig
    diffusion_steps: int
    load: Callable[[torch.device], UNet]
    told: str
    text: tuple[str, str] | None  # hashes of the encoder and tokenizer of the training


def find_net(checkpoint: str, model: str, weights: str, embeddings: str) -> Net:
    """The checkpoint, or with model= released weights; nothing of it is loaded yet.

    embeddings: their folder, whose width the net has if its file in conf/model does not give one.
    Raises: ValueError.
    """
    if model:
        file = Path(__file__).resolve().parents[2] / "conf" / "model" / f"{model}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise ValueError(f"model={model} must be one of {known}")
        schema = OmegaConf.structured(UNetConfig)
        config: UNetConfig = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(file)))  # type: ignore[assignment]
        config = replace(config, encoder_dim=config.encoder_dim or TextMeta.read(embeddings).dim)
        if not Path(checkpoint).exists():
            raise ValueError(f"no weights at '{checkpoint}': name a file or folder on this machine")

        def released(device: torch.device) -> UNet:
            with torch.device("meta"):
                unet = UNet(config)
            unet.load_state_dict(load_pretrained(checkpoint, config), assign=True)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            return unet.to(device, dtype).eval().requires_grad_(False)

        return Net(config, RELEASED_STEPS, released, f"{checkpoint} as {model}", None)
    trained = read_trained(checkpoint)
    text = (trained.text.weights_sha256, trained.text.tokenizer_sha256)

    def load(device: torch.device) -> UNet:
        low = device.type == "cuda" and trained.run["precision"] == "bf16"
        return trained.load(weights, device, torch.bfloat16 if low else torch.float32)

    told = f"{trained.run['run_dir']}, step {trained.step}, {weights}"
    return Net(trained.model, trained.diffusion_steps, load, told, text)
