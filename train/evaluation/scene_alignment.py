"""Does a picture show what its caption says? Measured in the pixels, for the captions of data/prepare/scenes.py.

No part of it is learned, so it judges generated pictures as well as drawn ones.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.prepare.scenes import COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES, TONES, coverage

_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_ONE = re.compile(rf"{_THING} on a ({'|'.join(TONES)}) (?:{'|'.join(TEXTURES)}) ground")
_TWO = re.compile(rf"{_THING} ({'|'.join(RELATIONS)}) {_THING}")

# A pixel has a colour that covers more than half of it; a region below this share of the picture is ignored.
MIN_COVER = 0.5
MIN_AREA = 0.004
SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2
# Direction and length of each colour's deviation from grey.
_CHROMA = np.array(list(COLOURS.values()), dtype=np.float32)
_CHROMA = _CHROMA - _CHROMA.mean(axis=1, keepdims=True)
_STRENGTH = np.linalg.norm(_CHROMA, axis=1)


@dataclass(frozen=True)
class Detection:
    """A shape detected in a picture; centre and width in units of the picture's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Alignment:
    """How much of a caption is true of a picture, each in [0, 1]; None for what the caption does not mention.

    colour, shape, size: the share of the caption's things that have it right; a thing whose colour is missing has all
    three wrong.  count: 1.0 if there are exactly as many things as the caption names. The ground's texture is ignored.
    """

    colour: float
    shape: float
    size: float
    count: float
    relation: float | None
    tone: float | None

    @property
    def score(self) -> float:
        """The mean of all that the caption mentions."""
        return float(np.mean([v for v in self._parts() if v is not None]))

    @property
    def exact(self) -> bool:
        """Whether all of the caption is true."""
        return all(v in (None, 1.0) for v in self._parts())

    def _parts(self) -> tuple[float | None, ...]:
        return (self.colour, self.shape, self.size, self.count, self.relation, self.tone)


def matches(image: np.ndarray, caption: str) -> bool:
    """Whether all that the caption says of things, positions and tone is true of the picture (uint8 [H, W, 3])."""
    return alignment(image, caption).exact


def alignment(image: np.ndarray, caption: str) -> Alignment:
    """Compare a caption with a picture (uint8 [H, W, 3], square, of 16 px or more).

    At 16 px it misjudges a tenth to a seventh of the shapes of true scenes, and hardly anything else.
    Raises: ValueError if the caption is not one of data/prepare/scenes.py, or the image has another shape or dtype.
    """
    wanted, relation, tone = _parse(caption)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]")
    things = detect(image)
    largest = {thing.colour: thing for thing in sorted(things, key=lambda thing: thing.width)}
    seen = [largest.get(colour) for _, colour, _ in wanted]
    pairs = [(thing, want) for thing, want in zip(seen, wanted, strict=True) if thing is not None]
    share = 1 / len(wanted)
    return Alignment(
        colour=share * len(pairs),
        shape=share * sum(thing.shape == shape for thing, (_, _, shape) in pairs),
        size=share * sum(thing.size == size for thing, (size, _, _) in pairs),
        count=float(len(things) == len(wanted)),
        relation=None if relation is None else float(_related(*seen) == relation),
        tone=None if tone is None else float(_tone(image) == tone),
    )


def detect(image: np.ndarray) -> list[Detection]:
    """The coloured shapes of a picture (uint8 [H, W, 3])."""
    pixels = image.astype(np.float32)
    deviation = pixels - pixels.mean(axis=2, keepdims=True)
    along = deviation @ (_CHROMA / _STRENGTH[:, None]).T
    nearest = along.argmax(axis=2)
    things = []
    for number, colour in enumerate(COLOURS):
        cover = np.clip(along[..., number] / _STRENGTH[number], 0, 1)
        for region in _regions((nearest == number) & (cover > MIN_COVER)):
            if region.mean() >= MIN_AREA:
                things.append(_recognise(np.where(_grown(region), cover, 0), colour))
    return things


def _parse(caption: str) -> tuple[list[tuple[str, str, str]], str | None, str | None]:
    """The (size, colour, shape) of each thing, and the relation or the ground's tone."""
    one, two = _ONE.fullmatch(caption), _TWO.fullmatch(caption)
    if one:
        return [(one[1], one[2], one[3])], None, one[4]
    if two:
        return [(two[1], two[2], two[3]), (two[5], two[6], two[7])], two[4], None
    raise ValueError(f"'{caption}' is not a caption of data.demo: its pixels can't be checked")


def _related(first: Detection | None, second: Detection | None) -> str | None:
    if first is None or second is None:
        return None
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _tone(image: np.ndarray) -> str:
    """The tone nearest to the median of the pixels; things cover less than half of them."""
    level = float(np.median(image.mean(axis=2)))
    return min(TONES, key=lambda name: abs(TONES[name] - level))


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask, each as a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        # Every pixel takes the highest label around it until none changes.
        spread = np.where(mask, _neighbourhood(labels).max(axis=0), 0)
        if (spread == labels).all():
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _grown(mask: np.ndarray) -> np.ndarray:
    return np.asarray(_neighbourhood(mask).any(axis=0))


def _neighbourhood(values: np.ndarray) -> np.ndarray:
    """The values themselves and those above, below, left and right: [5, H, W]."""
    padded = np.pad(values, 1)
    return np.stack([values, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def _recognise(cover: np.ndarray, colour: str) -> Detection:
    """The shape that differs least from the region when drawn with the same area and centroid.

    cover: the share of each pixel that the region's colour takes, 0 outside the region.
    """
    rows, columns = np.mgrid[0.5 : cover.shape[0], 0.5 : cover.shape[1]]
    area = cover.sum()
    x, y = (cover * columns).sum() / area, (cover * rows).sum() / area
    fits = []
    for shape in SHAPES:
        fill, drop = _template(shape)
        width = (area / fill) ** 0.5
        centre = y - drop * width
        difference = abs(coverage(shape, columns - x, rows - centre, width) - cover).sum()
        fits.append((difference, shape, centre, width))
    _, shape, centre, width = min(fits)
    side = min(cover.shape)
    size = "small" if width / side < SIZE_BORDER else "large"
    return Detection(shape, colour, size, float(x / side), float(centre / side), float(width / side))


@lru_cache
def _template(shape: str) -> tuple[float, float]:
    """The area of a shape of width 1, and how far below the centre of its box the centroid lies."""
    rows, columns = np.mgrid[0.5:200, 0.5:200]
    cover = coverage(shape, columns - 100, rows - 100, 160)
    return float(cover.sum() / 160**2), float((cover * (rows - 100)).sum() / cover.sum() / 160)
