"""Images from a checkpoint, or two: `python -m train.sample checkpoint=RUN_DIR prompt="a red circle"`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from data.checks import check_absent, check_at_least
from data.cli import command, location
from data.storage.atomic import atomic_folder
from train.checkpoint.format import check_weights

# Images of a strip.
STRIP = 8
# What a second stage alone has.
OF_SECOND = ("second_guidance_scale", "second_steps", "aug_level")


@dataclass
class Sample:
    """Draws images from a checkpoint: a folder with grid.png, the single images, and sample.json on how they were made.

    checkpoint: the folder of a run, whose newest checkpoint is taken, or of one step
    prompt: what to draw; "" is the empty caption, without guidance; left out: embeddings=, or else the prompts of the
        run's grids
    to: a second prompt: strips of images from prompt to this one, whose text states are mixed; n strips, each with one
        seed for all its images, so with the same noise
    strip: images of a strip, those of both prompts included; 8 if left out
    embeddings: a .npy file, [tokens, dim] or several of them, in place of a prompt
    n: images of each prompt, with the seeds seed, seed+1, ...
    guidance_scale: 1 follows the prompt as trained, more exaggerates it
    steps: a number of sampling steps, or one of IF's presets, such as smart100
    second: a run or a checkpoint of the second stage, which enlarges the images; the small ones are kept too
    second_guidance_scale: guidance_scale of the second stage
    second_steps: steps of the second stage
    aug_level: how much the second stage noises the small images, as a share of its timesteps: with more it keeps less
    seed: of the first image; in both stages
    scheduler: ddpm, ddim or dpm++; the second stage has ddpm
    encoder: the text encoder, a folder or a name on the hub, if it is not where the training had it
    weights: ema (their moving average) or master; in both stages
    ema_length: of another average, in both stages, as a share of the steps up to the checkpoint: a standard deviation
        such as 0.1
    micro_batch: images at a time
    steps_sheet: also steps.png, the first image at each step: the noisy one, and what the net takes it to come from;
        of a second stage second_steps.png
    out: the folder to write; samples/0001, samples/0002, ... if left out
    """

    checkpoint: str = location()
    prompt: str | None = None
    to: str | None = None
    strip: int | None = None
    embeddings: str = location("")
    n: int = 4
    guidance_scale: float = 7.0
    steps: str = "100"
    second: str = location("")
    second_guidance_scale: float = 4.0
    second_steps: str = "smart50"
    aug_level: float = 0.25
    seed: int = 0
    scheduler: str = "ddpm"
    encoder: str = location("")
    weights: str = "ema"
    ema_length: float | None = None
    micro_batch: int = 16
    steps_sheet: bool = False
    out: str = location("")


def run(args: Sample) -> Path:
    """Draw the images; returns the folder.

    Raises: ValueError for what cannot be sampled; OSError if the folder cannot be written.
    """
    check(args)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from data.device import default_device
    from train.checkpoint.post_hoc import open_checkpoint
    from train.sampling.cascade import draw_stages, first_stage, second_stage
    from train.sampling.output import next_folder, write_samples
    from train.sampling.prompts import find_prompts, find_strip
    from train.sampling.sampler import to_pixels
    from train.sampling.steps_sheet import StepsSheet

    # Guidance moves away from the empty caption, so that itself cannot be guided.
    is_empty = args.prompt is not None and args.to is None and not args.prompt.strip()
    strip = args.strip or STRIP
    scale, second_scale = (1.0, 1.0) if is_empty else (args.guidance_scale, args.second_guidance_scale)
    # Mistakes are reported before a net is loaded.
    checkpoint, device = open_checkpoint(args.checkpoint, args.ema_length), default_device()
    stages = [first_stage(checkpoint, scale, args.steps, args.scheduler)]
    if args.second:
        second = open_checkpoint(args.second, args.ema_length)
        stages.append(second_stage(second, checkpoint, second_scale, args.second_steps, args.aug_level))
    if args.prompt is not None and args.to is not None:
        prompts = find_strip(checkpoint, device, args.prompt, args.to, args.encoder, strip)
        seeds = [args.seed + i for i in range(args.n)] * strip
    else:
        guided = any(stage.guidance_scale != 1 for stage in stages)
        prompts = find_prompts(checkpoint, device, args.prompt, args.embeddings, args.encoder, guided)
        seeds = [args.seed + i for i in range(len(prompts.captions) * args.n)]
    out = Path(args.out) if args.out else next_folder(Path("samples"))
    sheets = [StepsSheet() for _ in stages]
    watch = sheets if args.steps_sheet else [lambda step: None for _ in stages]
    drawn = draw_stages(stages, args.weights, device, prompts, seeds, args.micro_batch, str(out), watch)
    images = [to_pixels(of_stage).numpy() for of_stage in drawn]
    titles = [stage.title(args.weights) for stage in stages]
    title = f"{'; second stage: '.join(titles)}, seeds {seeds[0]} to {seeds[-1]}"
    record = {name: value for name, value in asdict(args).items() if name not in OF_SECOND} | {
        "strip": None if args.to is None else strip, **stages[0].record(),
        "second": stages[1].record() | {"aug_level": args.aug_level} if args.second else None,
    }  # fmt: skip
    with atomic_folder(out) as folder:
        write_samples(folder, images, prompts.captions, seeds, title, record, strips=args.to is not None)
        for sheet, name, of_stage in zip(sheets, ("steps", "second_steps"), titles, strict=False):
            if args.steps_sheet:
                sheet.draw(f"{prompts.captions[0]}: {of_stage}, seed {seeds[0]}").save(folder / f"{name}.png")
    print(f"{out / 'grid.png'}: {title}; the images are in the same folder")
    return out


def check(args: Sample) -> None:
    """Raises: ValueError for an argument that cannot be used."""
    if args.prompt is not None and args.embeddings:
        raise ValueError("prompt= and embeddings= are both given: choose one")
    if args.to is not None and args.prompt is None:
        raise ValueError("to= is where a strip ends: give the prompt= too, with which it begins")
    if args.strip is not None:
        check_at_least("strip", args.strip, 2)
        if args.to is None:
            raise ValueError(f"strip={args.strip} is of a strip, which needs to=, the prompt where it ends")
    given = [name for name in OF_SECOND if getattr(args, name) != getattr(Sample, name)]
    if given and not args.second:
        raise ValueError(f"{given[0]}={getattr(args, given[0])} is of the second stage: give second=, a run of that")
    check_weights(args.weights, args.ema_length)
    check_at_least("n", args.n, 1)
    check_at_least("micro_batch", args.micro_batch, 1)
    check_at_least("seed", args.seed, 0)
    check_at_least("guidance_scale", args.guidance_scale, 0)
    check_at_least("second_guidance_scale", args.second_guidance_scale, 0)
    if not 0 <= args.aug_level < 1:
        raise ValueError(f"aug_level={args.aug_level} must be at least 0 and less than 1")
    check_absent("out", args.out)


def main(argv: list[str] | None = None) -> None:
    command(run, Sample, argv)


if __name__ == "__main__":
    main()
