"""A checkpoint as a folder that diffusers' pipelines load: `python -m train.export checkpoint=RUN_DIR out=DIR`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.checks import check_absent, check_choice
from data.cli import command, location
from data.storage.atomic import atomic_folder
from train.checkpoint.format import check_weights

if TYPE_CHECKING:
    from train.checkpoint.checkpoint import Checkpoint

DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Export:
    """Writes a checkpoint as a folder that diffusers' IFPipeline loads, and pushes it to the hub if asked to.

    Of the second stage it is IFSuperResolutionPipeline that loads it.
    checkpoint: the folder of a run, whose newest checkpoint is taken, or of one step
    out: the folder to write
    weights: ema (their moving average) or master
    ema_length: of another average, as a share of the steps up to the checkpoint: a standard deviation such as 0.1
    dtype: of the UNet: float32, float16 or bfloat16
    encoder: the T5 that the captions were embedded with, to go along: a folder, a name on the hub, or auto for the one
        that the checkpoint names
    license: of these weights, as the hub names it, such as apache-2.0
    push_to: repository on the hub to push the folder to, ORG/NAME; the same command again goes on with a push, from the
        folder that it wrote
    private: whether a new repository on the hub is private
    dry_run: with push_to, writes the folder and lists what would be sent, and sends nothing
    """

    checkpoint: str = location()
    out: str = location()
    weights: str = "ema"
    ema_length: float | None = None
    dtype: str = "float32"
    encoder: str = location("")
    license: str = "other"
    push_to: str = ""
    private: bool = True
    dry_run: bool = False


def export(args: Export, shard_size: str = "10GB") -> None:
    """Write the folder, and push it. What the hub would refuse is refused before the folder is written.

    Raises: ValueError for what cannot be read, does not fit diffusers' pipeline, exists already or cannot be pushed;
    OSError if it cannot be written.
    """
    check(args)
    out, destination = Path(args.out), None
    if args.push_to:
        from train.weights.push import check_contents, find_destination, make, push, take_up

        destination = find_destination(args.push_to, args.private)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from train.checkpoint.post_hoc import open_checkpoint
    from train.weights.model_card import model_card

    checkpoint = open_checkpoint(args.checkpoint, args.ema_length)
    facts = (args.weights, args.license, bool(args.encoder), args.dtype)
    card = model_card(checkpoint, args.push_to or out.name, *facts)
    if destination:
        check_contents(destination, card)
        if out.exists():
            take_up(out, card, lambda name: model_card(checkpoint, name, *facts))
    if not out.exists():
        _write(args, checkpoint, str(card), shard_size)
    if destination:
        if not args.dry_run:
            make(destination)
        message = f"Step {checkpoint.step:,}, {checkpoint.title(args.weights)} weights in {args.dtype}"
        push(destination, out, message, args.dry_run)


def _write(args: Export, checkpoint: "Checkpoint", card: str, shard_size: str) -> None:
    import torch

    from train.weights.diffusers_folder import build_pipeline, load_t5, save_pipeline

    out = Path(args.out)
    encoder = load_t5(args.encoder, checkpoint.text) if args.encoder else None
    pipeline = build_pipeline(checkpoint, args.weights, getattr(torch, args.dtype), encoder)
    with atomic_folder(out) as folder:
        save_pipeline(pipeline, folder, shard_size)
        (folder / "README.md").write_text(card, encoding="utf-8")
    takes = "without text encoder: give prompt_embeds"
    if encoder:
        takes = f"for prompts (clean_caption={encoder.cleaning != 'lower-strip'}, as in the training) or prompt_embeds"
    net = checkpoint.model
    enlarges = f"{net.low_res_size} -> " if net.low_res_size else ""
    print(f"{out}: an {type(pipeline).__name__} {takes}; {checkpoint.title(args.weights)} weights of step "
          f"{checkpoint.step} in {args.dtype}, {enlarges}{net.image_size} px, {checkpoint.diffusion_steps} diffusion "
          f"steps, {'learned' if net.learn_sigma else 'fixed'} variance")  # fmt: skip


def check(args: Export) -> None:
    """Raises: ValueError for an argument that cannot be used."""
    check_weights(args.weights, args.ema_length)
    check_choice("dtype", args.dtype, DTYPES)
    if not args.push_to:
        check_absent("out", args.out)
        if args.dry_run:
            raise ValueError("dry_run=true lists what push_to=ORG/NAME would send: name that too")
    if not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", args.license):
        raise ValueError(
            f"license={args.license!r} is not the name of a licence on the hub, such as apache-2.0, mit, openrail or "
            "other (https://huggingface.co/docs/hub/repositories-licenses)"
        )


def main(argv: list[str] | None = None) -> None:
    command(export, Export, argv)


if __name__ == "__main__":
    main()
