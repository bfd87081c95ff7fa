"""Scores against guidance scale: `python -m train.evaluate checkpoint=RUN_DIR shards=DIR text=DIR out=DIR`.

On several devices: `deepspeed --module train.evaluate ...`, or torchrun's `-m train.evaluate`. A rerun goes on.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data.checks import check_at_least, check_choice
from data.cli import command, location
from data.storage.caption_fields import TXT, check_fields
from train.checkpoint.format import check_weights
from train.evaluation.scores import DIM, FEATURES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import SchedulerMixin

    from train.checkpoint.checkpoint import Checkpoint
    from train.evaluation.chunked_array import ArrayFiller
    from train.evaluation.eval_set import EvalSet
    from train.evaluation.evaluated_net import EvaluatedNet
    from train.evaluation.features import Extractor


@dataclass
class Evaluate:
    """Draws pictures for captions at each guidance scale, and compares them with the captions' own pictures.

    A rerun with the same out= continues where it was interrupted.

    checkpoint: the folder of a run, whose newest checkpoint is taken, or of one step; with model=, released weights
    shards: captioned pictures
    text: the embeddings of their captions
    out: the folder to write
    scores: fid; fd_lite0 and kid_lite0, which are not FID; alignment, for the captions of data.demo
    samples: captions, chosen at random
    guidance_scales: 1 follows the prompt as trained, more exaggerates it
    steps: a number of sampling steps, or one of IF's presets, such as smart100
    scheduler: ddpm, ddim or dpm++
    seed: of the choice of captions and of the pictures
    weights: ema (their moving average) or master
    ema_length: of another average, as a share of the steps up to the checkpoint: a standard deviation such as 0.1. Of
        several each is evaluated, in a folder of its own, and the scores are drawn against them
    micro_batch: pictures at a time
    model: the net of released weights, such as if_i_xl: a file of conf/model
    adapter: a LoRA as diffusers saves it, a file or its folder, to merge into the net
    inception: the file of Inception's weights; downloaded if left out
    references: references-*.npz of an earlier evaluation with the same pictures, to save time
    caption: the field of the captions, txt or another one of data.captions
    """

    checkpoint: str = location()
    shards: str = location()
    text: str = location()
    out: str = location()
    scores: list[str] = field(default_factory=lambda: ["fid"])
    samples: int = 30_000
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 7.0])
    steps: str = "100"
    scheduler: str = "ddpm"
    seed: int = 0
    weights: str = "ema"
    ema_length: list[float] = field(default_factory=list)
    micro_batch: int = 64
    model: str = ""
    adapter: str = location("")
    inception: str = location("")
    references: str = location("")
    caption: str = TXT


def evaluate(args: Evaluate) -> list[dict[str, float]]:
    """All ranks draw and extract features, the first one scores; returns the scores at each guidance scale.

    Of several lengths of the average each is evaluated, in a folder of its own.
    Raises: ValueError for what cannot be evaluated; OSError if something cannot be read or written.
    """
    check(args)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from data.device import check_device, device_name
    from train.engine import init_distributed
    from train.evaluation.chunked_array import ArrayFiller
    from train.evaluation.eval_set import find_eval_set
    from train.evaluation.evaluated_net import find_net, open_nets
    from train.evaluation.features import load_extractor
    from train.evaluation.results import write_lengths
    from train.faults.first_rank import checked_by_first_rank
    from train.sampling.sampler import make_scheduler, set_steps

    check_device()
    rank, ranks, device = init_distributed()
    # Once, and by the first rank alone: a run that goes on has a newer checkpoint by and by, and a branch may move.
    opened = checked_by_first_rank(lambda: open_nets(args.checkpoint, args.model, args.ema_length))
    nets = [find_net(one, args.model, args.weights, args.text) for one in opened]
    eval_set = find_eval_set(args.shards, args.text, args.samples, args.seed, nets[0], args.caption)
    scheduler = make_scheduler(nets[0].diffusion_steps, nets[0].config.learn_sigma, args.scheduler)
    set_steps(scheduler, args.steps)
    if rank == 0:
        print(f"runs on {device_name(device)}")
    names = sorted({FEATURES[name] for name in args.scores} - {""})
    evaluate_one = partial(
        evaluate_net, eval_set=eval_set, scheduler=scheduler, device=device, references={},
        extractors=[load_extractor(name, args.inception, device) for name in names],
        filler=ArrayFiller(args.micro_batch, rank, ranks),
    )  # fmt: skip
    if len(nets) == 1:
        return evaluate_one(args, nets[0])
    lines, of = [], cast("Checkpoint", opened[0])
    for length, net in zip(args.ema_length, nets, strict=True):
        out = str(Path(args.out) / f"ema-length-{length:g}")
        of_length = replace(args, checkpoint=str(of.folder), ema_length=[length], out=out)
        lines += [{"ema_length": length} | line for line in evaluate_one(of_length, net)]
    if rank == 0:
        write_lengths(Path(args.out), of.folder, of.step, lines)
    return lines


def evaluate_net(
    args: Evaluate, net: "EvaluatedNet", eval_set: "EvalSet", scheduler: "SchedulerMixin", device: "torch.device",
    extractors: list["Extractor"], references: dict[str, "np.ndarray"], filler: "ArrayFiller",
) -> list[dict[str, float]]:  # fmt: skip
    """Evaluate one net; returns the scores at each guidance scale, on the first rank.

    references: their features by extractor, if they are known; what is computed is added.
    Raises: ValueError; OSError, as evaluate.
    """
    from train.evaluation.chunked_array import ChunkedArray
    from train.evaluation.drawing import draw
    from train.evaluation.manifest import make_manifest, settle
    from train.evaluation.references import extract_features, find_references
    from train.evaluation.results import SHOWN, write_results
    from train.evaluation.scores import score
    from train.weights.lora import merge_adapter

    out, unet = Path(args.out), net.load(device)
    if args.adapter:
        merge_adapter(unet, args.adapter)
    # The pictures beside it in a micro batch change the rounding of a picture.
    settings = {name: getattr(args, name) for name in ("samples", "seed", "steps", "scheduler", "micro_batch")}
    settings |= {"diffusion_steps": net.diffusion_steps}
    manifest = settle(out, partial(make_manifest, unet, eval_set, extractors, device, settings))

    drawn = {scale: ChunkedArray(out / f"guidance-{scale:g}", "images", args.samples) for scale in args.guidance_scales}
    for scale, images in drawn.items():
        filler.fill(
            images, partial(draw, unet, scheduler, args.steps, eval_set, args.seed, scale), f"guidance {scale:g}"
        )
    del unet

    features: dict[float, dict[str, np.ndarray]] = {scale: {} for scale in drawn}
    for extract in extractors:
        name, size = extract.name, net.config.image_size
        if name not in references:
            references[name] = find_references(out, args.references, extract, eval_set, size, filler, manifest)
        for scale, images in drawn.items():
            array = ChunkedArray(images.folder, name, args.samples)
            filler.fill(array, partial(extract_features, extract, images.read), f"guidance {scale:g}, {name}")
            features[scale][name] = array.read()
    if filler.rank:
        return []
    captions = eval_set.captions(0, args.samples if "alignment" in args.scores else min(SHOWN, args.samples))
    lines = [
        {"guidance_scale": scale} | score(args.scores, features[scale], references, images, captions)
        for scale, images in drawn.items()
    ]
    title = f"{net.description}; {args.samples:,} pictures of {net.config.image_size} px, "
    title += f"{args.scheduler} {args.steps} steps"
    write_results(out, title, asdict(args), manifest, lines, drawn, captions)
    return lines


def check(args: Evaluate) -> None:
    """Raises: ValueError for an argument that cannot be used, or fewer samples than a score needs."""
    if not args.scores:
        raise ValueError(f"scores=[] must be one or more of {', '.join(FEATURES)}")
    for name in args.scores:
        check_choice("scores", name, FEATURES)
    check_weights(args.weights, *args.ema_length)
    check_fields("caption", [args.caption])
    check_at_least("micro_batch", args.micro_batch, 1)
    check_at_least("seed", args.seed, 0)
    scales = args.guidance_scales
    if not scales or len(set(scales)) < len(scales) or not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(f"guidance_scales={scales} must be one or more different numbers, each at least 0")
    for name in args.scores:
        if name.startswith("f") and args.samples <= DIM[FEATURES[name]]:
            raise ValueError(
                f"samples={args.samples} are too few for {name}: the covariance of {DIM[FEATURES[name]]} features "
                f"needs samples={DIM[FEATURES[name]] + 1} or more; kid_lite0 needs fewer"
            )


def main(argv: list[str] | None = None) -> None:
    command(evaluate, Evaluate, argv)


if __name__ == "__main__":
    main()
