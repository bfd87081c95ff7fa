"""What is found when samples of a dataset are looked at: images, captions, embeddings, and what is wrong with them."""

import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.images import BadImage, preprocess
from data.loader.cursor import ENDED, TEXT_UNREADABLE, UNREADABLE, RawSample, ShardCursor
from data.loader.draws import Draw, Draws
from data.storage.shards import Shard
from data.text.embeddings import read_into
from data.text.meta import TextMeta

# To reach a sample, all headers before it are read: few samples from each of very many shards would take hours.
MOST_SHARDS = 64
TILES = 96


@dataclass(slots=True)
class Tile:
    """One sample as the network sees it: pixels uint8 [3, S, S]."""

    name: str
    caption: str
    pixels: np.ndarray


@dataclass(slots=True)
class Findings:
    """What was found in the samples looked at.

    looked: how many, in shards_looked shards.  kinds: format and mode.  sizes: (width, height) as stored.
    captions: those that are not empty.  bad: (sample, reason) as the trainer would count it.
    damaged: (location, error) of the tars that could not be read to their end.
    """

    looked: int = 0
    shards_looked: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
    without_caption: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)


class Eye:
    """Sees images as a training with this seed sees them in its first epoch."""

    def __init__(self, image_size: int, crop_shift: float, seed: int) -> None:
        self.image_size, self.crop_shift, self.crops = image_size, crop_shift, Draws(seed, Draw.CROP)

    def see(self, image: bytes, index: int) -> np.ndarray:
        """uint8 [3, S, S] of the sample with this index in the dataset.

        Raises: BadImage.
        """
        # In epoch 0 a sample's visit, the key of its draws, is its index: data.loader.order.Order.visit.
        return preprocess(image, self.image_size, self.crop_shift, self.crops.at(index))


def choose(counts: list[int], samples: int) -> dict[int, list[int]]:
    """The rows to look at in each shard, taken evenly; 0 samples stand for all of them."""
    if samples == 0:
        return {shard: list(range(count)) for shard, count in enumerate(counts) if count}
    filled = np.flatnonzero(counts)
    shards = filled[np.unique(np.arange(MOST_SHARDS) * len(filled) // MOST_SHARDS)]
    ends = np.cumsum(np.asarray(counts)[shards])
    places = np.unique(np.arange(samples) * int(ends[-1]) // samples)
    at = np.searchsorted(ends, places, side="right")
    rows: dict[int, list[int]] = {}
    for shard, row in zip(shards[at], places - ends[at] + np.asarray(counts)[shards[at]], strict=True):
        rows.setdefault(int(shard), []).append(int(row))
    return rows


def look(shards: list[Shard], samples: int, eye: Eye, text: str, meta: TextMeta | None) -> Findings:
    """Look at samples of the shards and, if there is a meta, at their embeddings in the folder text."""
    counts = [shard.count for shard in shards]
    starts = np.cumsum([0, *counts]).tolist()
    chosen = choose(counts, samples)
    total = sum(map(len, chosen.values()))
    tiles = {place * total // TILES for place in range(TILES)}
    found = Findings(shards_looked=len(chosen))
    with tqdm(total=total, desc="inspect", unit="img") as bar:
        for number, rows in chosen.items():
            cursor = ShardCursor(shards[number], text if meta else "")
            for row in rows:
                raw = cursor.read(row)
                pixels, problem = _look_at(raw, starts[number] + row, eye, meta, found)
                if problem:
                    found.bad.append((raw.name, problem))
                if pixels is not None and found.looked in tiles:
                    found.tiles.append(Tile(raw.name, raw.caption.decode("utf-8", "replace"), pixels))
                found.looked += 1
                bar.update()
            found.damaged += cursor.damages()
            cursor.close()
    return found


def _look_at(
    raw: RawSample, index: int, eye: Eye, meta: TextMeta | None, found: Findings
) -> tuple[np.ndarray | None, str]:
    """Note one sample; returns its pixels, if it has any, and why the training can't use it, or ''."""
    if raw.problem in (ENDED, UNREADABLE):
        return None, raw.problem
    caption = raw.caption.decode("utf-8", "replace")
    if caption.strip():
        found.captions.append(caption)
    else:
        found.without_caption += 1
    if not raw.image:
        return None, raw.problem
    try:
        pixels = eye.see(raw.image, index)
    except BadImage as problem:
        return None, raw.problem or str(problem)
    try:
        with Image.open(io.BytesIO(raw.image), formats=["JPEG", "PNG"]) as opened:
            found.kinds[f"{opened.format} {opened.mode}"] += 1
            found.sizes[opened.size] += 1
    except Exception:  # what the trainer's decoder passes over in a header, Pillow's may raise anything for
        found.kinds["of an odd header"] += 1
    if meta and not raw.problem:
        try:
            read_into(np.empty(meta.shape, meta.array_dtype), raw.embedding, meta)
        except ValueError as problem:
            return pixels, str(problem)
        except OSError:
            return pixels, TEXT_UNREADABLE
    return pixels, raw.problem
