"""A new concept from 5 pictures: what a DreamBooth run on the demo scenes' net learned, and what it kept.

python -m tests.benchmarks.new_concept pictures=DIR writes the 5 pictures: an orange ring, which no scene has.
python -m tests.benchmarks.new_concept before=RUN_DIR after=RUN_DIR shards=DIR text=DIR prompt=... compares two runs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.alignment import alignment
from data.cli import parse
from data.encoder import load_encoder
from data.shards import find_shards
from data.text import TextMeta
from train.eval_set import EvalSet
from train.plots import plot_grid
from train.pretrained import Trained, read_trained
from train.sampler import make_scheduler, sample

ORANGE, SIDE = (250, 130, 20), 96
# Of the pictures' pixels; less than a tenth is orange in a scene whose things are not.
MIN_ORANGE = 0.04


@dataclass
class NewConcept:
    """Draws the pictures, or compares nets before and after; prompts: of the concept; captions: of the scenes, kept."""

    pictures: str = ""
    before: str = ""
    after: str = ""
    shards: str = ""
    text: str = ""
    prompt: str = "a zwx ring"
    pictures_each: int = 24
    captions: int = 96
    guidance_scale: float = 3.0
    steps: str = "25"
    grid: str = "new_concept.png"


def draw_rings(folder: Path) -> None:
    """Five orange rings on grounds of different greys."""
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


def orange_share(images: np.ndarray) -> np.ndarray:
    """The share of each picture's pixels that are nearer to the ring's orange than to the scenes' red and yellow.

    images: uint8 [N, 3, H, W].
    """
    pixels = images.astype(np.float64).transpose(0, 2, 3, 1)
    colours = np.array([ORANGE, (220, 35, 40), (235, 205, 30), (45,) * 3, (128,) * 3, (210,) * 3], dtype=np.float64)
    nearest = ((pixels[..., None, :] - colours) ** 2).sum(-1).argmin(-1)
    return (nearest == 0).mean((1, 2))


def pictures_of(trained: Trained, text_emb: torch.Tensor, empty: torch.Tensor, args: NewConcept) -> np.ndarray:
    """One for each embedding, by the same seeds for every net."""
    unet = trained.load("ema", torch.device("cpu"))
    scheduler = make_scheduler(trained.diffusion_steps, trained.model.learn_sigma)
    return sample(unet, scheduler, text_emb, empty, args.guidance_scale, args.steps, range(len(text_emb))).numpy()


def main() -> None:
    """Print the table and draw the grid."""
    args = parse(NewConcept)
    if args.pictures:
        draw_rings(Path(args.pictures))
        return
    nets = {"before": read_trained(args.before), "after": read_trained(args.after)}
    encoder = load_encoder(nets["before"].text)
    concept = torch.from_numpy(encoder([args.prompt] * args.pictures_each))
    kept = EvalSet(find_shards(args.shards), args.text, TextMeta.read(args.text), args.captions, seed=0)
    captions, stored = kept.prompts(0, args.captions)
    scenes, empty = torch.from_numpy(stored).float(), torch.from_numpy(encoder([""])[0])
    print(f"| net | '{args.prompt}': pictures with the ring's colour | its share of pixels | scenes: alignment |")
    print("|---|---:|---:|---:|")
    shown: list[np.ndarray] = []
    for name, trained in nets.items():
        rings, others = (pictures_of(trained, emb, empty, args) for emb in (concept, scenes))
        shares = orange_share(rings)
        scores = [alignment(image.transpose(1, 2, 0), c).score for image, c in zip(others, captions, strict=True)]
        print(
            f"| {name} | {int((shares > MIN_ORANGE).sum())} of {len(shares)} | {shares.mean():.1%} "
            f"| {np.mean(scores):.3f} +- {np.std(scores) / len(scores) ** 0.5:.3f} |"
        )
        shown += [rings[:8], others[:8]]
    told = [args.prompt] * 8 + captions[:8]
    plot_grid(np.concatenate(shown), told * 2, "rows 1, 2: before; rows 3, 4: after", Path(args.grid))


if __name__ == "__main__":
    main()
