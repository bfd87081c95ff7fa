"""The data of a DreamBooth: a few pictures of a concept under one prompt, and pictures of its class by the net itself.

python -m train.dreambooth checkpoint=RUN_DIR pictures=DIR prompt="a zwx toy" class_prompt="a toy" out=DIR
"""

from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING

from data.checks import check_at_least
from data.cli import command, how_called, location

# What only the pictures of the class need.
OF_CLASS = ("class_prompt", "prior", "guidance_scale", "steps", "seed", "micro_batch")


@dataclass
class DreamBooth:
    """Makes out/concept and out/prior, each with shards and text, for the experiment finetune_dreambooth.

    A rerun makes what is missing, and makes again what other arguments, pictures or another checkpoint change. For a
    net of the second stage there is out/concept alone, for the experiment finetune_dreambooth_ii.

    checkpoint: the one that the fine-tuning starts from: the folder of a run, whose newest is taken, or of one step
    pictures: a folder with a handful of pictures of the concept
    prompt: for these pictures, with a rare word in it
    class_prompt: one prompt for the class, or a .txt file with one on each line; the first stage needs it
    out: the folder to write
    prior: pictures of the class to draw
    guidance_scale: for them; 1 follows the prompt as trained, more exaggerates it
    steps: for them: a number of sampling steps, or one of IF's presets, such as smart100
    seed: of the first of them
    micro_batch: pictures at a time
    encoder: the text encoder, a folder or a name on the hub, if it is not where the training had it
    """

    checkpoint: str = location()
    pictures: str = location()
    prompt: str = MISSING
    class_prompt: str = ""
    out: str = location()
    prior: int = 200
    guidance_scale: float = 4.0
    steps: str = "100"
    seed: int = 0
    micro_batch: int = 16
    encoder: str = location("")


def prepare(args: DreamBooth) -> None:
    """Write the sets of pictures and their embeddings.

    Raises: ValueError for what cannot be used; OSError if something cannot be written.
    """
    for name, least in (("prior", 1), ("micro_batch", 1), ("guidance_scale", 0), ("seed", 0)):
        check_at_least(name, getattr(args, name), least)
    if not args.prompt.strip():
        raise ValueError("prompt= is empty: give a prompt")
    folder = Path(args.pictures)
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder.absolute()}': put the pictures of the concept there")
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from data.embed import Embed, embed
    from data.prepare.folder import list_folder
    from train.checkpoint.checkpoint import Checkpoint
    from train.sampling.dreambooth_data import (
        Drawing,
        draw_class,
        read_concept,
        read_prompts,
        remove_other_embeddings,
        write_pictures,
    )  # fmt: skip
    from train.sampling.prompts import warn_of_lost_words

    checkpoint, out = Checkpoint.open(args.checkpoint), Path(args.out)
    enlarges = checkpoint.model.low_res_size > 0
    check_class(args, enlarges)
    meta, prompts = checkpoint.text.exact, [] if enlarges else read_prompts(args.class_prompt, args.prior)
    for prompt in dict.fromkeys([args.prompt, *prompts]):
        warn_of_lost_words(prompt, meta.cleaning)
    files = [folder / row.name for row in list_folder(folder) if not row.problem]
    concept = read_concept(files, checkpoint.model.image_size)
    write_pictures(out / "concept", [(picture, args.prompt) for picture in concept])
    names = ["concept"] if enlarges else ["concept", "prior"]
    if not enlarges:
        drawing = Drawing.of(checkpoint, prompts, args.guidance_scale, args.steps, args.seed)
        if reason := drawing.to_draw(out / "prior"):
            print(f"the pictures of the class are drawn: {reason}")
            pictures = draw_class(checkpoint, drawing, args.encoder, args.micro_batch, out / "prior")
            drawing.write(out / "prior", pictures)
    for name in names:
        remove_other_embeddings(out / name / "text", meta)
        embed(Embed(str(out / name / "shards"), str(out / name / "text"), args.encoder or meta.encoder, meta.tokens,
                    meta.compute, meta.dtype, cleaning=meta.cleaning))  # fmt: skip
    data = " ".join(f"data.mixture.{name}.{kind}={out / name / kind}" for name in names for kind in ("shards", "text"))
    train = "if-train train" if how_called().startswith("if-train ") else "deepspeed train/main.py"
    of_class = "" if enlarges else f", {args.prior} of its class"
    experiment = "finetune_dreambooth_ii" if enlarges else "finetune_dreambooth"
    print(f"{out}: {len(concept)} pictures of the concept{of_class}; next, with the net's own model=\n"
          f"{train} +experiment={experiment} init_from={args.checkpoint} {data}")  # fmt: skip


def check_class(args: DreamBooth, enlarges: bool) -> None:
    """Raises: ValueError if no class is named, or if one is for a net that enlarges images, the second stage's."""
    if not enlarges and not args.class_prompt.strip():
        raise ValueError("class_prompt= is empty: give a prompt for the class")
    for name, default in ((f.name, f.default) for f in fields(args) if f.name in OF_CLASS):
        if enlarges and getattr(args, name) != default:
            raise ValueError(
                f"{name}={getattr(args, name)} is for pictures of the class, and '{args.checkpoint}' is of the second "
                f"stage, which enlarges images and draws none by itself: leave {name} out"
            )


def main(argv: list[str] | None = None) -> None:
    command(prepare, DreamBooth, argv)


if __name__ == "__main__":
    main()
