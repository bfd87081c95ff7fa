"""Images from a checkpoint: `python -m train.sample checkpoint=RUN_DIR prompt="a red circle"`."""

import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.cli import command
from data.config import DataConfig, Dataset, find_datasets
from data.encoder import TextEncoder, load_encoder
from data.stream import stored_prompts
from data.tars import write_json
from data.text import TextMeta, read_empty
from model.unet import TextState
from train.plots import plot_grid
from train.pretrained import Trained, read_trained
from train.sampler import make_scheduler, sample, set_steps

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


@dataclass
class Prompts:
    """Captions and their embeddings.  Shapes: text_emb [P, L, D]; empty [L, D], that of the empty caption."""

    captions: list[str]
    text_emb: Tensor
    empty: Tensor


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
    prompts = find_prompts(args, trained, device)
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


def find_prompts(args: Sample, trained: Trained, device: torch.device) -> Prompts:
    """What to draw, by the encoder of the training or from stored embeddings.

    Raises: ValueError if neither is to be had, or they don't fit the training.
    """
    if args.prompt is not None and (args.prompt.strip() or args.encoder):
        encoder = load_encoder(trained.text, args.encoder, device)
        warn_of_cut(encoder, args.prompt)
        text_emb, empty = torch.from_numpy(encoder([args.prompt, ""])).split(1)
        return Prompts([args.prompt], text_emb, empty[0])
    if args.embeddings:
        text_emb = read_embeddings(Path(args.embeddings), trained.text)
        empty = text_emb[0] if args.guidance_scale == 1 else stored_empty(args, trained, device)
        return Prompts([f"{Path(args.embeddings).name} {i}" for i in range(len(text_emb))], text_emb, empty)
    if args.prompt is not None:
        empty = stored_empty(args, trained, device)
        return Prompts([""], empty[None], empty)
    datasets = find_data(trained)
    if trained.run.get("text", {}).get("mode") == "online":
        encoder = load_encoder(trained.text, args.encoder, device)
        for dataset in datasets:
            dataset.encoder = encoder
    stored = stored_prompts(datasets, trained.text, trained.run["sample"]["prompts"])
    text_emb = torch.stack([torch.from_numpy(embedding) for _, embedding in stored])
    return Prompts([caption for caption, _ in stored], text_emb, stored_empty(args, trained, device))


def find_data(trained: Trained) -> list[Dataset]:
    """The datasets of the training.

    Raises: ValueError if they are not here, or embedded otherwise by now.
    """
    data: DataConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), trained.run["data"]))  # type: ignore[assignment]
    try:
        datasets = find_datasets(data)
        metas = [TextMeta.read(dataset.text) for dataset in datasets]
    except ValueError as error:
        raise ValueError(
            f"the data of the training, with its captions, is not here ({error}): give a prompt=, or embeddings="
        ) from None
    for dataset, meta in zip(datasets, metas, strict=True):
        if meta != trained.text:
            raise ValueError(
                f"the embeddings in '{dataset.text}' are others than those of the training, made by "
                f"{meta.encoder}: give a prompt=, or embeddings="
            )
    return datasets


def stored_empty(args: Sample, trained: Trained, device: torch.device) -> Tensor:
    """[L, D], the empty caption, from beside the embeddings of the training, or by its encoder where that is named.

    Raises: ValueError.
    """
    if args.encoder:
        return torch.from_numpy(load_encoder(trained.text, args.encoder, device)([""])[0])
    try:
        return torch.from_numpy(read_empty(find_data(trained)[0].text, trained.text).copy())
    except ValueError as error:
        raise ValueError(
            f"no embedding of the empty caption, which guidance needs ({error}): "
            "name the encoder=, or set guidance_scale=1"
        ) from None


def read_embeddings(path: Path, meta: TextMeta) -> Tensor:
    """[P, L, D] from a .npy file; nothing is unpickled.

    Raises: ValueError if it holds anything but such embeddings as the net was trained on.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"embeddings={path} cannot be read as .npy: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        raise ValueError(f"embeddings={path} is not one array of floating-point numbers: save it with np.save")
    if values.ndim not in (2, 3) or values.shape[-2:] != (meta.tokens, meta.dim) or not len(values):
        raise ValueError(
            f"embeddings={path} is {list(values.shape)}, the net was trained on [{meta.tokens}, {meta.dim}], "
            f"by {meta.encoder}: give one such array, or several as [P, {meta.tokens}, {meta.dim}]"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"embeddings={path} has values that are not finite: embed the captions anew")
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, meta.tokens, meta.dim)


def warn_of_cut(encoder: TextEncoder, prompt: str) -> None:
    """Say what of a prompt is beyond the tokens that the net was trained with."""
    ids = encoder.tokenizer(encoder.clean(prompt), add_special_tokens=False, verbose=False).input_ids
    room = encoder.tokens - encoder.tokenizer.num_special_tokens_to_add()
    if len(ids) > room:
        kept, cut = encoder.tokenizer.decode(ids[:room]), encoder.tokenizer.decode(ids[room:])
        print(
            f"warning: the prompt has {len(ids)} tokens, of which the net takes {room}; left out: {cut!r}; "
            f"kept: {kept!r}",
            file=sys.stderr,
        )


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
