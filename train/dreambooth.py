"""The data of a DreamBooth: a few pictures of a concept under one prompt, and its class as the net draws it by itself.

python -m train.dreambooth checkpoint=RUN_DIR pictures=DIR prompt="a zwx toy" class_prompt="a toy" out=DIR
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm

from data.cli import command
from data.embed import Embed, embed
from data.images import BadImage, decode
from data.pack import list_folder
from data.prepare.packing import key_of
from data.storage.tars import stats_path, write_shard
from data.text.encoder import load_encoder
from train.sampling.sampler import make_scheduler, sample, set_steps
from train.weights.pretrained import Trained, read_trained

FEW = 100


@dataclass
class DreamBooth:
    """Makes out/concept and out/prior, each with shards and text, for the experiment finetune_dreambooth.

    checkpoint: that the fine-tuning begins from. pictures: a folder of a handful. prompt: for them, with a rare word.
    class_prompt: one prompt, or several in a file (.txt, one a line). prior: pictures of the class. encoder: where it
    lies now, if not where the training had it.
    """

    checkpoint: str = MISSING
    pictures: str = MISSING
    prompt: str = MISSING
    class_prompt: str = MISSING
    out: str = MISSING
    prior: int = 200
    guidance_scale: float = 4.0
    steps: str = "100"
    seed: int = 0
    micro_batch: int = 16
    encoder: str = ""


def prepare(args: DreamBooth) -> None:
    """Raises: ValueError for what cannot be used; OSError if it cannot be written. A rerun adds what is missing."""
    if args.prior < 1 or args.micro_batch < 1 or not 0 <= args.guidance_scale < math.inf:
        raise ValueError(
            f"prior={args.prior}, micro_batch={args.micro_batch} must be at least 1, guidance_scale from 0"
        )
    if not args.prompt.strip() or not args.class_prompt.strip():
        raise ValueError("prompt= and class_prompt= must say something")
    trained = read_trained(args.checkpoint)
    out = Path(args.out)
    concept = read_concept(Path(args.pictures))
    _write(out / "concept", [(picture, args.prompt) for picture in concept])
    if not stats_path(out / "prior" / "shards" / "00000.tar").exists():
        _write(out / "prior", draw_class(args, trained))
    for name in ("concept", "prior"):
        meta = trained.text
        embed(Embed(str(out / name / "shards"), str(out / name / "text"), args.encoder or meta.encoder, meta.tokens,
                    meta.compute, meta.dtype))  # fmt: skip
    where = " ".join(f"data.mixture.{n}.{k}={out / n / k}" for n in ("concept", "prior") for k in ("shards", "text"))
    print(f"{out}: {len(concept)} pictures of the concept, {args.prior} of its class; next, with the net's own model=\n"
          f"deepspeed train/main.py +experiment=finetune_dreambooth init_from={args.checkpoint} {where}")  # fmt: skip


def read_concept(folder: Path) -> list[bytes]:
    """The JPEGs and PNGs of a folder. Raises: ValueError if one is neither, or there are many."""
    if not folder.is_dir():
        raise ValueError(f"no folder '{folder}': put the pictures of the concept there")
    found = []
    for row in list_folder(folder):
        data = (folder / row.name).read_bytes()
        try:
            decode(data)
        except BadImage as error:
            raise ValueError(f"'{folder / row.name}' cannot be used: {error}") from None
        found.append(data)
    if len(found) > FEW:
        raise ValueError(
            f"'{folder}' holds {len(found)} pictures: a concept has a handful; for more take finetune_lora"
        )
    return found


def draw_class(args: DreamBooth, trained: Trained) -> list[tuple[bytes, str]]:
    """Pictures of the class, as the net draws them before it is tuned, with their prompts.

    Source: Ruiz et al. 2023, section 3.3.
    """
    file = Path(args.class_prompt)
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".txt" else [args.class_prompt]
    prompts = [line.strip() for line in lines if line.strip()]
    prompts = [prompts[i % len(prompts)] for i in range(args.prior)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scheduler = make_scheduler(trained.diffusion_steps, trained.model.learn_sigma)
    set_steps(scheduler, args.steps)
    encoder = load_encoder(trained.text, args.encoder)
    empty = torch.from_numpy(encoder([""])[0])
    low = device.type == "cuda" and trained.run["precision"] == "bf16"
    unet = trained.load("ema", device, torch.bfloat16 if low else torch.float32)
    made: list[tuple[bytes, str]] = []
    for first in tqdm(range(0, args.prior, args.micro_batch), "pictures of the class", unit="batch"):
        some = prompts[first : first + args.micro_batch]
        text_emb = torch.from_numpy(encoder(some))
        seeds = range(args.seed + first, args.seed + first + len(some))
        images = sample(unet, scheduler, text_emb, empty, args.guidance_scale, args.steps, seeds)
        made += [(_png(image), prompt) for image, prompt in zip(images.numpy(), some, strict=True)]
    return made


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def _write(folder: Path, pictures: list[tuple[bytes, str]]) -> None:
    samples = [
        (key_of(0, i), {"png" if data.startswith(b"\x89PNG") else "jpg": data, "txt": prompt.encode()})
        for i, (data, prompt) in enumerate(pictures)
    ]
    write_shard(folder / "shards" / "00000.tar", samples)


def main(argv: list[str] | None = None) -> None:
    command(prepare, DreamBooth, argv)


if __name__ == "__main__":
    main()
