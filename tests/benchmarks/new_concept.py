"""A new concept from 5 pictures: what DreamBooth runs on the demo scenes' net learned, and what they kept.

python -m tests.benchmarks.new_concept draw=datasets/rings shards=datasets/scenes/shards
    writes the 5 pictures, an orange ring, which no scene has, and class_prompts.txt, captions of scenes, beside them.
python -m tests.benchmarks.new_concept before=RUN_DIR after=[RUN_DIR,...] shards=DIR text=DIR grid=FILE
    compares the net before with those after, each a run with a seed of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.cli import command, location
from data.storage.shards import find_shards
from data.text.encoder import load_encoder
from data.text.meta import TextMeta
from train.checkpoint.checkpoint import Checkpoint
from train.evaluation.eval_set import EvalSet, Pictures
from train.evaluation.scene_alignment import alignment
from train.monitor.plots import plot_grid
from train.sampling.sampler import make_scheduler, sample
from train.weights.trained_net import load_net

ORANGE, SIDE = (250, 130, 20), 96
# Of the pictures' pixels; less than a tenth is orange in a scene whose things are not.
MIN_ORANGE = 0.04


@dataclass
class NewConcept:
    """Draws the pictures of a new concept, or compares nets before and after they learned it.

    shards: the demo scenes.
    draw: a folder to write the concept's pictures and class prompts to; nothing is compared then.
    before: the run that the nets begin from.
    after: the runs that learned the concept.
    text: the scenes' embeddings.
    prompt: caption of the concept.
    pictures_each: pictures of the concept that each net draws.
    captions: captions of scenes that each net draws.
    guidance_scale: of the sampler.
    steps: of the sampler.
    grid: a .png for the pictures.
    """

    shards: str = location()
    draw: str = location("")
    before: str = location("")
    after: list[str] = location([])
    text: str = location("")
    prompt: str = "a zwx ring"
    pictures_each: int = 16
    captions: int = 96
    guidance_scale: float = 3.0
    steps: str = "20"
    grid: str = location("new_concept.png")


def draw_rings(folder: Path, captions: list[str]) -> None:
    """Five orange rings on grounds of different greys; the captions, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0.5:SIDE, 0.5:SIDE]
    for i, grey in enumerate((45, 90, 128, 170, 210)):
        x, y = rng.uniform(0.4, 0.6, 2) * SIDE
        inside = abs(np.hypot(columns - x, rows - y) - 0.24 * SIDE) < 0.075 * SIDE
        picture = np.full((SIDE, SIDE, 3), grey, np.float64)
        picture[inside] = ORANGE
        picture += rng.normal(0, 4, picture.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"ring-{i}.png")
    (folder / "class_prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def orange_share(images: np.ndarray) -> np.ndarray:
    """The share of each picture's pixels that are nearer to the ring's orange than to the scenes' red and yellow.

    images: uint8 [N, 3, H, W].
    """
    pixels = images.astype(np.float64).transpose(0, 2, 3, 1)
    colours = np.array([ORANGE, (220, 35, 40), (235, 205, 30), (45,) * 3, (128,) * 3, (210,) * 3], dtype=np.float64)
    nearest = ((pixels[..., None, :] - colours) ** 2).sum(-1).argmin(-1)
    return (nearest == 0).mean((1, 2))


def pictures_of(checkpoint: Checkpoint, text_emb: torch.Tensor, empty: torch.Tensor, args: NewConcept) -> np.ndarray:
    """One for each embedding, by the same seeds for every net."""
    unet = load_net(checkpoint, "ema", torch.device("cpu"))
    scheduler = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma)
    return sample(unet, scheduler, text_emb, empty, args.guidance_scale, args.steps, range(len(text_emb))).numpy()


def compare(args: NewConcept) -> None:
    """Print the table and draw the grid."""
    if args.draw:
        scenes = Pictures(find_shards(args.shards), args.captions, seed=0)
        draw_rings(Path(args.draw), scenes.captions(0, args.captions))
        return
    nets = {folder: Checkpoint.open(folder) for folder in (args.before, *args.after)}
    encoder = load_encoder(nets[args.before].text)
    concept = torch.from_numpy(encoder([args.prompt] * args.pictures_each))
    kept = EvalSet(find_shards(args.shards), args.captions, 0, args.text, TextMeta.read(args.text))
    captions, stored = kept.captions(0, args.captions), kept.embeddings(0, args.captions)
    scene_emb, empty = torch.from_numpy(stored).float(), torch.from_numpy(encoder([""])[0])
    print(f"| net | '{args.prompt}': orange pictures | share of orange | scenes: alignment | less that before |")
    print("|---|---:|---:|---:|---:|")
    shown: list[np.ndarray] = []
    of_before = None
    for folder, checkpoint in nets.items():
        rings, others = (pictures_of(checkpoint, emb, empty, args) for emb in (concept, scene_emb))
        shares = orange_share(rings)
        scores = np.array(
            [alignment(image.transpose(1, 2, 0), c).score for image, c in zip(others, captions, strict=True)]
        )
        of_before = scores if of_before is None else of_before
        # Caption by caption, the same noise: what differs is the net alone.
        apart = scores - of_before
        print(
            f"| {folder} | {int((shares > MIN_ORANGE).sum())} of {len(shares)} | {shares.mean():.1%} "
            f"| {with_error(scores)} | {with_error(apart)} |",
            flush=True,
        )
        shown += [rings[:8], others[:8]]
    told = [args.prompt] * 8 + captions[:8]
    plot_grid(np.concatenate(shown), told * (len(shown) // 2), "two rows a net, before first", Path(args.grid))


def with_error(values: np.ndarray) -> str:
    """The mean and its standard error."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main(argv: list[str] | None = None) -> None:
    command(compare, NewConcept, argv)


if __name__ == "__main__":
    main()
