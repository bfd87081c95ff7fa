"""Scores against guidance scale: `python -m train.evaluate checkpoint=RUN_DIR shards=DIR text=DIR out=DIR`.

On several devices: `deepspeed --module train.evaluate ...`, or torchrun's `-m train.evaluate`. A rerun goes on.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data.checks import check_at_least, check_choice
from data.cli import command, location
from data.storage.caption_fields import TXT, check_fields
from train.checkpoint.format import check_weights
from train.evaluation.scores import DIM, FEATURES, OF_PAIRS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import SchedulerMixin

    from model.config import UNetConfig
    from train.checkpoint.checkpoint import Checkpoint
    from train.evaluation.chunked_array import ArrayFiller
    from train.evaluation.drawing import Pieces
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
    scores: fid; fd_lite0 and kid_lite0, which are not FID; alignment, for the captions of data.demo; of the second
        stage psnr, and consistency, the psnr of the picture made small again
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
    aug_levels: in the second stage, how much the small images are noised, a share of the timesteps below 1; 0.25 if
        left out
    low_res: in the second stage, a guidance-SCALE folder of an evaluation of the first stage: enlarges what that drew,
        and not the captions' own pictures made small
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
    aug_levels: list[float] = field(default_factory=list)
    low_res: str = location("")


def evaluate(args: Evaluate) -> list[dict[str, Any]]:
    """All ranks draw and extract features, the first one scores; returns the settings and scores of each drawing.

    Of several lengths of the average each is evaluated, in a folder of its own.
    Raises: ValueError for what cannot be evaluated; OSError if something cannot be read or written.
    """
    check(args)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from data.device import check_device, device_name
    from train.engine import init_distributed
    from train.evaluation.chunked_array import ArrayFiller
    from train.evaluation.enlarging import find_low_res
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
    config = nets[0].config
    check_stage(args, config)
    eval_set = find_eval_set(args.shards, args.text, args.samples, args.seed, nets[0], args.caption)
    low_res = find_low_res(args.low_res, eval_set, config.low_res_size) if config.low_res_size else None
    scheduler = make_scheduler(nets[0].diffusion_steps, config.learn_sigma, args.scheduler, config.low_res_size > 0)
    set_steps(scheduler, args.steps)
    if rank == 0:
        print(f"runs on {device_name(device)}")
    names = sorted({FEATURES[name] for name in args.scores} - {""})
    evaluate_one = partial(
        evaluate_net, eval_set=eval_set, low_res=low_res, scheduler=scheduler, device=device, references={},
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
    args: Evaluate, net: "EvaluatedNet", eval_set: "EvalSet", low_res: "Pieces | None", scheduler: "SchedulerMixin",
    device: "torch.device", extractors: list["Extractor"], references: dict[str, "np.ndarray"], filler: "ArrayFiller",
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluate one net; returns the settings and scores of each drawing, on the first rank.

    low_res: what a net of the second stage enlarges.
    references: their features by extractor, if they are known; what is computed is added.
    Raises: ValueError; OSError, as evaluate.
    """
    from train.evaluation.chunked_array import ChunkedArray
    from train.evaluation.drawing import draw, find_drawings
    from train.evaluation.enlarging import enlarge_without_net, plot_examples, score_pairs
    from train.evaluation.manifest import make_manifest, settle
    from train.evaluation.references import extract_features, find_references
    from train.evaluation.results import SHOWN, write_results
    from train.evaluation.scores import score
    from train.weights.lora import merge_adapter

    out, unet, size, small = Path(args.out), net.load(device), net.config.image_size, net.config.low_res_size
    if args.adapter:
        merge_adapter(unet, args.adapter)
    # The pictures beside it in a micro batch change the rounding of a picture.
    settings = {name: getattr(args, name) for name in ("samples", "seed", "steps", "scheduler", "micro_batch")}
    settings |= {"diffusion_steps": net.diffusion_steps}
    manifest = settle(out, partial(make_manifest, unet, eval_set, extractors, device, settings, args.low_res))
    drawings = find_drawings(out, args.samples, drawn_at(args, net.config))
    for one in drawings:
        filler.fill(
            one.images, partial(draw, unet, scheduler, args.steps, eval_set, args.seed, one.settings, low_res), one.name
        )
    del unet
    true = partial(eval_set.pictures, image_size=size)
    if low_res:
        drawings = enlarge_without_net(out, low_res, size, args.samples, filler) + drawings

    features: dict[str, dict[str, np.ndarray]] = {one.name: {} for one in drawings}
    for extract in extractors:
        name = extract.name
        if name not in references:
            references[name] = find_references(out, args.references, extract, eval_set, size, filler, manifest)
        for one in drawings:
            array = ChunkedArray(one.images.folder, name, args.samples)
            filler.fill(array, partial(extract_features, extract, one.images.read), f"{one.name}, {name}")
            features[one.name][name] = array.read()
    if low_res:
        for one in drawings:
            features[one.name] |= score_pairs(args.scores, one, true, low_res, small, filler)
    if filler.rank:
        return []
    captions = eval_set.captions(0, args.samples if "alignment" in args.scores else min(SHOWN, args.samples))
    lines = [
        one.settings | score(args.scores, features[one.name], references, one.images, captions) for one in drawings
    ]
    title = f"{net.description}; {args.samples:,} pictures of {size} px, "
    title += f"enlarged from {'drawn' if args.low_res else 'true'} ones of {small} px, " if low_res else ""
    title += f"{args.scheduler} {args.steps} steps"
    write_results(out, title, asdict(args), manifest, lines, drawings, captions)
    if low_res:
        plot_examples(out / "examples.png", title, captions, low_res, drawings, true)
    return lines


def drawn_at(args: Evaluate, config: "UNetConfig") -> list[dict[str, float]]:
    """The settings that the net draws at."""
    from model.super_resolution import AUG_LEVEL

    levels = [{"aug_level": float(level)} for level in args.aug_levels or [AUG_LEVEL]] if config.low_res_size else [{}]
    return [{"guidance_scale": float(scale)} | level for level in levels for scale in args.guidance_scales]


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
    if (
        not scales
        or len({f"{scale:g}" for scale in scales}) < len(scales)
        or not all(0 <= scale < math.inf for scale in scales)
    ):
        raise ValueError(
            f"guidance_scales={scales} must be one or more numbers, each at least 0, different in six digits"
        )
    levels = args.aug_levels
    if len({f"{level:g}" for level in levels}) < len(levels) or not all(0 <= level < 1 for level in levels):
        raise ValueError(f"aug_levels={levels} must be numbers, each at least 0 and below 1, different in six digits")
    if args.low_res and "psnr" in args.scores:
        raise ValueError("scores=psnr compares with the true picture, and low_res= was drawn: take consistency")
    for name in args.scores:
        if name.startswith("f") and args.samples <= DIM[FEATURES[name]]:
            raise ValueError(
                f"samples={args.samples} are too few for {name}: the covariance of {DIM[FEATURES[name]]} features "
                f"needs samples={DIM[FEATURES[name]] + 1} or more; kid_lite0 needs fewer"
            )


def check_stage(args: Evaluate, config: "UNetConfig") -> None:
    """Raises: ValueError for what is of the second stage, if the net is of the first."""
    of_second = [f"scores={name}" for name in OF_PAIRS if name in args.scores]
    of_second += [f"{name}={value}" for name in ("aug_levels", "low_res") if (value := getattr(args, name))]
    if of_second and not config.low_res_size:
        raise ValueError(f"{of_second[0]} is of the second stage, and the net of the first: leave it out")


def main(argv: list[str] | None = None) -> None:
    command(evaluate, Evaluate, argv)


if __name__ == "__main__":
    main()
