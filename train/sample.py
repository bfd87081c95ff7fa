"""Images from a checkpoint: `python -m train.sample checkpoint=RUN_DIR prompt="a red circle"`."""

import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm

from data.cli import command
from data.storage.tars import write_json
from model.unet import TextState
from train.monitor.plots import plot_grid
from train.sampling.prompts import find_prompts
from train.sampling.sampler import make_scheduler, sample, set_steps
from train.weights.pretrained import Trained, read_trained

GRID = 256  # images in grid.png, at most
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Sample:
    """Draws images from a checkpoint: a folder with grid.png, the single images, and sample.json on what they are.

    checkpoint: a run's folder, for its latest, or a step's folder. prompt: "" is the empty caption, without guidance.
    Without a prompt: embeddings=FILE.npy, [tokens, dim] or several of them, or else captions of the run's own data.
    n: images of each prompt, with the seeds from seed on. steps: their number, or one of IF's presets (smart100, ...).
    scheduler: ddpm, ddim or dpm++. encoder: where it lies, if not where the training had it. weights: ema or master.
    micro_batch: images at a time. out: the folder, samples/0001 and so on by default.
    """

    checkpoint: str = MISSING
    prompt: str | None = None
    embeddings: str = ""
    n: int = 4
    guidance_scale: float = 7.0
    steps: str = "100"
    seed: int = 0
    scheduler: str = "ddpm"
    encoder: str = ""
    weights: str = "ema"
    micro_batch: int = 16
    out: str = ""


def run(args: Sample) -> Path:
    """Write the folder aside, then rename; returns it.

    Raises: ValueError for what cannot be sampled; OSError if it cannot be written.
    """
    check(args)
    if args.prompt is not None and not args.prompt.strip():
        args = replace(args, guidance_scale=1.0)  # away from itself the empty caption can't be guided
    trained = read_trained(args.checkpoint)
    scheduler = make_scheduler(trained.diffusion_steps, trained.model.learn_sigma, args.scheduler)
    set_steps(scheduler, args.steps)  # a mistake is to be told before the net is loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = find_prompts(trained, device, args.prompt, args.embeddings, args.encoder, args.guidance_scale != 1)
    dtype = DTYPES[trained.run["precision"]] if device.type == "cuda" else torch.float32
    unet = trained.load(args.weights, device, dtype)

    with torch.no_grad():
        per_prompt = unet.encode_text(prompts.text_emb.to(device))
    text = TextState(*(value.repeat_interleave(args.n, 0) for value in per_prompt))
    seeds = [args.seed + i for i in range(len(text.pooled))]
    images = []
    with tqdm(total=len(seeds), unit="image", disable=None) as bar:
        for start in range(0, len(seeds), args.micro_batch):
            part = slice(start, start + args.micro_batch)
            some = TextState(*(value[part] for value in text))
            images.append(sample(unet, scheduler, some, prompts.empty, args.guidance_scale, args.steps, seeds[part]))
            bar.update(len(images[-1]))
    return write(args, trained, prompts.captions, seeds, torch.cat(images).numpy())


def check(args: Sample) -> None:
    """Raises: ValueError for arguments that cannot be."""
    if args.prompt is not None and args.embeddings:
        raise ValueError("prompt= and embeddings= are both given: choose one")
    if args.weights not in ("ema", "master"):
        raise ValueError(f"weights={args.weights} must be one of ema, master")
    for name, value, least in (("n", args.n, 1), ("micro_batch", args.micro_batch, 1), ("seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not 0 <= args.guidance_scale < math.inf:
        raise ValueError(f"guidance_scale={args.guidance_scale} must be a number from 0 on")
    if args.out and Path(args.out).exists():
        raise ValueError(f"'{args.out}' is there already: choose another out=, or delete it")


def write(args: Sample, trained: Trained, captions: list[str], seeds: list[int], images: np.ndarray) -> Path:
    """The folder of results, aside and renamed. images: [N, 3, H, W] uint8."""
    out = Path(args.out) if args.out else next_folder(Path("samples"))
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    of_each = [caption for caption in captions for _ in range(args.n)]
    names = [f"{i // args.n:03d}-seed-{seed}.png" for i, seed in enumerate(seeds)]
    title = (
        f"step {trained.step:,}, {args.weights}, {args.scheduler} {args.steps} steps, "
        f"guidance {args.guidance_scale:g}, seeds {seeds[0]} to {seeds[-1]}"
    )
    told = asdict(args) | {
        "checkpoint": trained.folder.name, "step": trained.step, "run_dir": trained.run["run_dir"],
        "images": [{"file": name, "caption": caption, "seed": seed}
                   for name, caption, seed in zip(names, of_each, seeds, strict=True)],
    }  # fmt: skip
    try:
        aside.mkdir(parents=True)
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(aside / name)
        plot_grid(images[:GRID], of_each[:GRID], title, aside / "grid.png", args.n if 1 < args.n <= 8 else 8)
        write_json(aside / "sample.json", told)
        os.replace(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"'{out}' could not be written ({error}): make space, or choose another out=") from None
    print(f"{out / 'grid.png'}: {title}; the single images beside it")
    return out


def next_folder(parent: Path) -> Path:
    """The first of parent/0001, parent/0002, ... after all that are there."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / f"{max(taken, default=0) + 1:04d}"


def main(argv: list[str] | None = None) -> None:
    command(run, Sample, argv)


if __name__ == "__main__":
    main()
