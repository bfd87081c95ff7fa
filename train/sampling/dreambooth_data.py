"""The pictures of a DreamBooth: those of the concept, and those of its class. The command is train.dreambooth."""

import io
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data.images import BadImage, decode
from data.prepare.packing import key_of
from data.storage.tars import write_shard
from data.text.encoder import load_encoder
from train.checkpoint.checkpoint import Checkpoint
from train.sampling.sampler import make_scheduler, sample, set_steps
from train.weights.trained_net import default_device, load_net

# A concept has at most this many pictures.
FEW = 100


def read_concept(files: list[Path]) -> list[bytes]:
    """The pictures of a concept, JPEGs and PNGs as they are.

    Raises: ValueError if a file is neither, or there are many of them.
    """
    if len(files) > FEW:
        raise ValueError(
            f"pictures= holds {len(files)}: a concept has a handful; for more use +experiment=finetune_lora"
        )
    pictures = [file.read_bytes() for file in files]
    for file, picture in zip(files, pictures, strict=True):
        try:
            decode(picture)
        except BadImage as error:
            raise ValueError(f"'{file}' cannot be used: {error}") from None
    return pictures


def read_prompts(text: str, count: int) -> list[str]:
    """`count` prompts: one prompt, or the lines of a .txt file, again and again.

    Raises: ValueError if the file has none; OSError if it cannot be read.
    """
    lines = Path(text).read_text(encoding="utf-8").splitlines() if text.endswith(".txt") else [text]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"class_prompt={text} holds no prompt: write one on each line")
    return [prompts[i % len(prompts)] for i in range(count)]


def draw_class(
    checkpoint: Checkpoint, prompts: list[str], encoder: str, guidance_scale: float, steps: str, seed: int,
    micro_batch: int,
) -> list[tuple[bytes, str]]:  # fmt: skip
    """A picture as PNG for each prompt, drawn before the net is tuned, with its prompt.

    encoder: its folder or name on the hub, '' for what the checkpoint names.
    Raises: ValueError if the encoder or the weights cannot be loaded, or these steps cannot be taken.
    Source: Ruiz et al. 2023, section 3.3.
    """
    scheduler = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma)
    set_steps(scheduler, steps)
    text_encoder = load_encoder(checkpoint.text, encoder)
    empty = torch.from_numpy(text_encoder([""])[0])
    unet = load_net(checkpoint, "ema", default_device())
    drawn: list[tuple[bytes, str]] = []
    for first in tqdm(range(0, len(prompts), micro_batch), "pictures of the class", unit="batch"):
        batch = prompts[first : first + micro_batch]
        text_emb = torch.from_numpy(text_encoder(batch))
        seeds = range(seed + first, seed + first + len(batch))
        images = sample(unet, scheduler, text_emb, empty, guidance_scale, steps, seeds).numpy()
        for image, prompt in zip(images, batch, strict=True):
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
            drawn.append((file.getvalue(), prompt))
    return drawn


def write_pictures(folder: Path, pictures: list[tuple[bytes, str]]) -> None:
    """Write pictures (PNG or JPEG) and their prompts as a shard."""
    samples = [
        (key_of(0, i), {"png" if data.startswith(b"\x89PNG") else "jpg": data, "txt": prompt.encode()})
        for i, (data, prompt) in enumerate(pictures)
    ]
    write_shard(folder / "shards" / "00000.tar", samples)
