"""The pictures of a DreamBooth: those of the concept, and those of its class. The command is train.dreambooth."""

import hashlib
import io
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from data.device import default_device
from data.images import BadImage, decode
from data.prepare.packing import key_of
from data.progress import Progress
from data.storage.tars import stats_path, write_json, write_shard
from data.text.encoder import load_encoder
from data.text.meta import TextMeta
from train.checkpoint.checkpoint import Checkpoint
from train.sampling.sampler import make_scheduler, sample, set_steps
from train.weights.trained_net import load_net

# A concept has at most this many pictures.
FEW = 100
# How the pictures of the class were drawn, beside their shards.
RECORD = "class.json"


def read_concept(files: list[Path], image_size: int) -> list[bytes]:
    """The pictures of a concept, JPEGs and PNGs as they are; prints which of them the training enlarges.

    image_size: side in pixels of the images that the net sees.
    Raises: ValueError if a file is neither, or there are many of them.
    """
    if len(files) > FEW:
        raise ValueError(
            f"pictures= holds {len(files)}: a concept has a handful; for more use +experiment=finetune_lora"
        )
    pictures = [file.read_bytes() for file in files]
    small = []
    for file, picture in zip(files, pictures, strict=True):
        try:
            size = decode(picture).size
        except BadImage as error:
            raise ValueError(f"'{file}' cannot be used: {error}") from None
        small += [f"{file.name} of {size[0]} x {size[1]}"] if min(size) < image_size else []
    if small:
        print(
            f"warning: {len(small)} of {len(files)} pictures are enlarged to {image_size} px, and the net learns their "
            f"blur ({', '.join(small[:3])}): give pictures whose shorter side has {image_size} px or more",
            file=sys.stderr,
        )
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


@dataclass(frozen=True)
class Drawing:
    """What decides the pictures of a class; kept beside them in class.json.

    checkpoint: a hash of its files.  prompts: one for each picture.  seed: of the first.
    """

    checkpoint: str
    prompts: list[str]
    guidance_scale: float
    steps: str
    seed: int

    @staticmethod
    def of(checkpoint: Checkpoint, prompts: list[str], guidance_scale: float, steps: str, seed: int) -> "Drawing":
        """The drawing by a checkpoint's net."""
        files = json.dumps([checkpoint.manifest["sha256"], checkpoint.config.get("init_from")], sort_keys=True)
        return Drawing(hashlib.sha256(files.encode()).hexdigest(), prompts, guidance_scale, steps, seed)

    def to_draw(self, folder: Path) -> str:
        """Why these pictures are to be drawn; '' if they are in the folder."""
        try:
            there = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "there are none yet"
        changed = [name for name, value in asdict(self).items() if there.get(name) != value]
        if changed:
            return f"those there were drawn with another {', '.join(changed)}"
        return "" if stats_path(folder / "shards" / "00000.tar").exists() else "they were not finished"

    def write(self, folder: Path, pictures: list[tuple[bytes, str]]) -> None:
        """Write the pictures, and then the record of how they were drawn.

        Raises: OSError.
        """
        (folder / RECORD).unlink(missing_ok=True)  # until all is written it would be of other pictures
        write_pictures(folder, pictures)
        write_json(folder / RECORD, asdict(self))


def draw_class(
    checkpoint: Checkpoint, drawing: Drawing, encoder: str, micro_batch: int, out: str | Path = ""
) -> list[tuple[bytes, str]]:
    """A picture as PNG for each prompt, drawn before the net is tuned, with its prompt.

    encoder: its folder or name on the hub, '' for what the checkpoint names.  out: where they will be, to tell it.
    Raises: ValueError if the encoder or the weights cannot be loaded, or these steps cannot be taken.
    Source: Ruiz et al. 2023, section 3.3.
    """
    prompts, steps, seed = drawing.prompts, drawing.steps, drawing.seed
    scheduler = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma)
    set_steps(scheduler, steps)
    device = default_device()
    text_encoder = load_encoder(checkpoint.text, encoder, device)
    empty = torch.from_numpy(text_encoder([""])[0])
    batches = [prompts[first : first + micro_batch] for first in range(0, len(prompts), micro_batch)]
    text_embs = [torch.from_numpy(text_encoder(batch)) for batch in batches]
    del text_encoder  # a GPU need not hold it beside the net
    unet = load_net(checkpoint, "ema", device)
    drawn: list[tuple[bytes, str]] = []
    with Progress("pictures of the class", len(prompts), "picture", out) as progress:
        for batch, text_emb in zip(batches, text_embs, strict=True):
            seeds = range(seed + len(drawn), seed + len(drawn) + len(batch))
            images = sample(unet, scheduler, text_emb, empty, drawing.guidance_scale, steps, seeds).numpy()
            for image, prompt in zip(images, batch, strict=True):
                file = io.BytesIO()
                Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
                drawn.append((file.getvalue(), prompt))
            progress.update(len(batch))
    return drawn


def write_pictures(folder: Path, pictures: list[tuple[bytes, str]]) -> None:
    """Write pictures (PNG or JPEG) and their prompts as a shard."""
    samples = [
        (key_of(0, i), {"png" if data.startswith(b"\x89PNG") else "jpg": data, "txt": prompt.encode()})
        for i, (data, prompt) in enumerate(pictures)
    ]
    write_shard(folder / "shards" / "00000.tar", samples)


def remove_other_embeddings(folder: Path, meta: TextMeta) -> None:
    """Remove the embeddings that an earlier call made otherwise, as for a checkpoint with another cleaning.

    Raises: OSError.
    """
    try:
        there = replace(TextMeta.read(folder), encoder=meta.encoder)  # only its place
    except ValueError:
        return
    changed = [name for name, value in meta.entries().items() if getattr(there, name) != value]
    if changed:
        print(f"the embeddings in {folder} were made with another {', '.join(changed)}: they are made again")
        shutil.rmtree(folder)
