"""Scores against guidance scale: `python -m train.evaluate checkpoint=RUN_DIR shards=DIR text=DIR out=DIR`.

On several devices: `deepspeed --module train.evaluate ...`, or torchrun's `-m train.evaluate`. Run again, it goes on.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import SchedulerMixin
from omegaconf import MISSING

from data.cli import command
from data.storage.shards import find_shards
from data.storage.tars import write_json
from data.text.meta import check_sidecars
from model.unet import UNet
from train.evaluation.chunked_array import ChunkedArray, Work
from train.evaluation.eval_set import EvalSet
from train.evaluation.features import DIM, load_extractor
from train.evaluation.references import _features, find_references
from train.evaluation.scores import FEATURES, score
from train.evaluation.subject import Net, find_net
from train.monitor.plots import plot_grid, plot_scores
from train.sampling.sampler import make_scheduler, sample, set_steps
from train.weights.lora import merge_adapter
from train.weights.pretrained import read_trained

SETTINGS, SCORES = "evaluation.json", "scores.json"
SHOWN = 16
# Seeds of different evaluations don't meet below so many pictures.
SEED_STRIDE = 1_000_003


@dataclass
class Evaluate:
    """Draws a picture for each of `samples` captions at each guidance scale, and compares them with the captions' own.

    checkpoint: a run's folder, for its latest, or a step's; with model=if_i_xl, a file of conf/model, released weights.
    shards, text: captioned pictures and their embeddings, as for a training. scores: fid; fd_lite0 and kid_lite0, which
    are no FID; alignment, for the captions of data.demo. inception: the file of its weights. references: a file that an
    earlier evaluation wrote, to spare the time. adapter: a LoRA in diffusers' form, laid over the net. micro_batch:
    pictures at a time. weights: ema or master.
    """

    checkpoint: str = MISSING
    shards: str = MISSING
    text: str = MISSING
    out: str = MISSING
    scores: list[str] = field(default_factory=lambda: ["fid"])
    samples: int = 30_000
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 7.0])
    steps: str = "100"
    scheduler: str = "ddpm"
    seed: int = 0
    weights: str = "ema"
    micro_batch: int = 64
    model: str = ""
    adapter: str = ""
    inception: str = ""
    references: str = ""


def evaluate(args: Evaluate) -> list[dict[str, float]]:
    """All ranks draw and extract, the first scores; returns a line of scores for each guidance scale.

    Raises: ValueError for what cannot be evaluated; OSError if something cannot be read or written.
    """
    check(args)
    net = find_net(args.checkpoint, args.model, args.weights, args.text)
    eval_set = find_eval_set(args, net)
    scheduler = make_scheduler(net.diffusion_steps, net.config.learn_sigma, args.scheduler)
    set_steps(scheduler, args.steps)
    out, now = Path(args.out), settings(args, net, eval_set)
    check_same(out, now)

    # Imported here: the engine takes seconds to import, and a mistake above is to be told at once.
    from train.engine import init_distributed

    rank, ranks, device = init_distributed()
    work = Work(args.micro_batch, rank, ranks)
    names = sorted({FEATURES[score] for score in args.scores} - {""})
    extractors = [load_extractor(name, args.inception, device) for name in names]
    dist.barrier()  # nobody writes before all have looked
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, now)

    unet = net.load(device)
    if args.adapter:
        merge_adapter(unet, args.adapter)
    drawn = {scale: ChunkedArray(out / f"guidance-{scale:g}", "images", args.samples) for scale in args.guidance_scales}
    for scale, images in drawn.items():
        work.fill(images, partial(draw, unet, scheduler, eval_set, args, scale), f"guidance {scale:g}")
    del unet

    references, found = {}, {}
    for extract in extractors:
        references[extract.name] = find_references(out, args.references, extract, eval_set, net.config.image_size, work)
        for scale, images in drawn.items():
            features = ChunkedArray(images.folder, extract.name, args.samples)
            work.fill(features, partial(_features, extract, images.read), f"guidance {scale:g}, {extract.name}")
            found[extract.name, scale] = features.read()
    if rank:
        return []
    captions = eval_set.captions(0, args.samples if "alignment" in args.scores else min(SHOWN, args.samples))
    lines = [
        {"guidance_scale": scale} | score(args.scores, scale, found, references, images, captions)
        for scale, images in drawn.items()
    ]
    show(args, net, lines, drawn, captions)
    return lines


def draw(
    unet: UNet, scheduler: SchedulerMixin, eval_set: EvalSet, args: Evaluate, scale: float, first: int, stop: int
) -> np.ndarray:
    """Pictures of the prompts from first to stop, each by the seed of its own number; uint8 [n, 3, H, W]."""
    text_emb, empty = torch.from_numpy(eval_set.embeddings(first, stop)), torch.from_numpy(eval_set.empty.copy())
    seeds = [args.seed * SEED_STRIDE + i for i in range(first, stop)]
    return sample(unet, scheduler, text_emb, empty, scale, args.steps, seeds).numpy()


def check(args: Evaluate) -> None:
    """Raises: ValueError for arguments that cannot be, and for fewer samples than a score needs."""
    unknown = [name for name in args.scores if name not in FEATURES]
    if unknown or not args.scores:
        raise ValueError(f"scores={args.scores} must be some of {', '.join(FEATURES)}")
    if args.weights not in ("ema", "master"):
        raise ValueError(f"weights={args.weights} must be one of ema, master")
    if args.micro_batch < 1 or args.seed < 0:
        raise ValueError(f"micro_batch={args.micro_batch} must be at least 1 and seed={args.seed} at least 0")
    scales = args.guidance_scales
    if not scales or len(set(scales)) < len(scales) or not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(f"guidance_scales={scales} must be different numbers from 0 on")
    for name in args.scores:
        if name.startswith("f") and args.samples <= DIM[FEATURES[name]]:
            raise ValueError(
                f"samples={args.samples} are too few for {name}: the covariance of {DIM[FEATURES[name]]} features "
                f"needs samples={DIM[FEATURES[name]] + 1} or more; kid_lite0 does with fewer"
            )


def find_eval_set(args: Evaluate, net: Net) -> EvalSet:
    """Raises: ValueError if the captions weren't embedded as those that the net was trained on."""
    shards = find_shards(args.shards)
    tokens = read_trained(args.checkpoint).text.tokens if net.text else 77
    meta = check_sidecars(shards, args.text, tokens, net.config.encoder_dim)
    if net.text and net.text != (meta.weights_sha256, meta.tokenizer_sha256):
        raise ValueError(
            f"the captions in '{args.text}' were embedded by {meta.encoder}, which is not the encoder that the net was "
            "trained with: embed them with that one"
        )
    return EvalSet(shards, args.samples, args.seed, args.text, meta)


def settings(args: Evaluate, net: Net, eval_set: EvalSet) -> dict:
    """What the pictures of a folder depend on, beside their guidance scale."""
    return {
        "net": net.told, "adapter": args.adapter, "image_size": net.config.image_size, "samples": args.samples,
        "seed": args.seed, "steps": args.steps, "scheduler": args.scheduler, "captions": eval_set.digest,
        "encoder": eval_set.meta.weights_sha256,
    }  # fmt: skip


def check_same(out: Path, now: dict) -> None:
    """Raises: ValueError if `out` holds another evaluation."""
    path = out / SETTINGS
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    changed = [f"{name}={there.get(name)} (now {now[name]})" for name in now if there.get(name) != now[name]]
    if changed:
        raise ValueError(f"'{out}' holds another evaluation, of {', '.join(changed)}: choose another out=")


def show(
    args: Evaluate, net: Net, lines: list[dict[str, float]], drawn: dict[float, ChunkedArray], captions: list[str]
) -> None:
    """scores.json, scores.png, a grid for each scale, and the scores in print."""
    out, told = Path(args.out), f"{net.told}; {args.samples:,} pictures of {net.config.image_size} px, "
    told += f"{args.scheduler} {args.steps} steps"
    write_json(out / SCORES, {"of": told, "arguments": asdict(args), "scores": lines})
    plot_scores(lines, told, out / "scores.png")
    for scale, images in drawn.items():
        shown = min(SHOWN, args.samples)
        plot_grid(images.read(0, shown), captions[:shown], f"{told}, guidance {scale:g}", images.folder / "grid.png")
    print(told)
    for line in lines:
        print("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
    print(f"{out / SCORES}, {out / 'scores.png'}")


def main(argv: list[str] | None = None) -> None:
    # The deepspeed launcher appends --local_rank=N; the rank is in the environment too.
    argv = [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank")]
    command(evaluate, Evaluate, argv)


if __name__ == "__main__":
    main()
