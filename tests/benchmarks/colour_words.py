"""Do pictures have the colours that their captions name? Judged by pixels, for drawings on a white ground.

python -m tests.benchmarks.colour_words run=runs/fluent shards=datasets/fluent/shards text=datasets/fluent/minilm \
    grid=FILE.png
draws the captions that name one colour. A colour word stands for the median, over the real pictures with that word, of
the mean colour of what is not ground. A picture is right if its own mean is nearest to its word's. White is left out:
on a white ground it cannot be seen.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.cli import command, location
from data.storage.shards import find_shards
from data.text.meta import TextMeta
from train.checkpoint.checkpoint import Checkpoint
from train.evaluation.eval_set import EvalSet
from train.monitor.plots import plot_grid
from train.sampling.sampler import make_scheduler, sample
from train.weights.trained_net import load_net

WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
# A pixel with a darker channel than this is not ground; a picture with fewer such pixels has no colour.
GROUND, MIN_PIXELS = 225, 8


@dataclass
class ColourWords:
    """Draws captions that name a colour, and judges the colours of the pictures.

    run: a run, whose newest checkpoint is taken, or a checkpoint.
    shards: captioned pictures.
    text: the embeddings of their captions.
    guidance_scales: of the sampler.
    steps: of the sampler.
    max_value: the most that dynamic thresholding divides a predicted picture by; 1 clips it, IF's is 1.5.
    grid: a .png for pictures of the last guidance scale.
    """

    run: str = location()
    shards: str = location()
    text: str = location()
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 4.0])
    steps: str = "50"
    max_value: float = 1.5
    grid: str = location("")


def mean_colour(image: np.ndarray) -> np.ndarray:
    """The mean colour [3] of what is not ground, white if there is nothing.  image: uint8 [3, H, W]."""
    pixels = image.reshape(3, -1).T.astype(np.float64)
    shown = pixels[pixels.min(1) < GROUND]
    return shown.mean(0) if len(shown) >= MIN_PIXELS else np.full(3, 255.0)


def judge(colours: np.ndarray, words: list[str], real: np.ndarray, own: bool = False) -> np.ndarray:
    """Whether each colour [N, 3] is nearest to its word's, given the colours [N, 3] of the real pictures.

    own: the colours are those of the real pictures, each of which is then judged by the others.
    """
    right = []
    for i, (colour, word) in enumerate(zip(colours, words, strict=True)):
        kept = [k for k in range(len(words)) if not own or k != i]
        distance = {
            w: np.linalg.norm(colour - np.median([real[k] for k in kept if words[k] == w], axis=0)) for w in set(words)
        }
        right.append(min(distance, key=distance.__getitem__) == word)
    return np.array(right)


def measure(args: ColourWords) -> None:
    """Print the shares and draw the grid."""
    checkpoint = Checkpoint.open(args.run)
    shards = find_shards(args.shards)
    total = sum(shard.count for shard in shards)
    everything = EvalSet(shards, total, 0, args.text, TextMeta.read(args.text))
    captions = everything.captions(0, total)
    named = [[w for w in WORDS if w in re.findall(r"[a-z]+", caption.lower())] for caption in captions]
    chosen = [i for i, words in enumerate(named) if len(words) == 1]
    words = [named[i][0] for i in chosen]
    alone = {word for word, n in Counter(words).items() if n == 1}  # it has no others to be judged by
    chosen, words = (
        [i for i, w in zip(chosen, words, strict=True) if w not in alone],
        [w for w in words if w not in alone],
    )
    size = checkpoint.model.image_size
    real = np.stack([mean_colour(everything.pictures(i, i + 1, size)[0]) for i in chosen])
    clear = judge(real, words, real, own=True)
    print(f"{len(words)} captions name one colour; of their own pictures {clear.sum()} have it")
    text_emb = torch.from_numpy(np.concatenate([everything.embeddings(i, i + 1) for i in chosen])).float()
    unet = load_net(checkpoint, "ema", torch.device("cpu"))
    scheduler = make_scheduler(checkpoint.diffusion_steps, checkpoint.model.learn_sigma)
    scheduler.register_to_config(sample_max_value=args.max_value)
    empty = torch.from_numpy(everything.empty.copy()).float()
    for scale in args.guidance_scales:
        images = sample(unet, scheduler, text_emb, empty, scale, args.steps, range(len(words))).numpy()
        right = judge(np.stack([mean_colour(image) for image in images]), words, real)
        told = ", ".join(
            f"{w} {sum(r for r, v in zip(right, words, strict=True) if v == w)} of {words.count(w)}"
            for w in WORDS if w in words
        )  # fmt: skip
        of_clear = f"{right[clear].sum()} of {clear.sum()} ({right[clear].mean():.0%})"
        print(f"guidance {scale:g}: right {right.sum()} of {len(words)} ({right.mean():.0%}); {told}")
        print(f"    of those whose own picture has the colour: {of_clear}")
    if args.grid:
        title = f"{args.run}: captions with a colour word, guidance {args.guidance_scales[-1]:g}"
        plot_grid(images, [captions[i] for i in chosen], title, Path(args.grid))


def main(argv: list[str] | None = None) -> None:
    command(measure, ColourWords, argv)


if __name__ == "__main__":
    main()
