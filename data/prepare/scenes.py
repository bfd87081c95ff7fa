"""Procedural scenes: one or two coloured shapes on a textured ground, each with a true caption.

Lengths are in units of the picture's short side, which is also the side of the square crop in the training.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
# Hues far apart and of strong chroma, so that a pixel's colour survives JPEG and the resize.
COLOURS = {
    "red": (220, 35, 40),
    "yellow": (235, 205, 30),
    "green": (35, 165, 50),
    "cyan": (35, 200, 215),
    "blue": (35, 70, 220),
    "purple": (165, 45, 200),
}
SIZES = {"small": (0.17, 0.20), "large": (0.28, 0.31)}
RELATIONS = ("left of", "right of", "above", "below")
TONES = {"black": 45, "grey": 128, "white": 210}
TEXTURES = ("striped", "checked", "spotted", "grainy")
# Every word of the captions.
VOCABULARY = ("a", *SIZES, *COLOURS, *SHAPES, *" ".join(RELATIONS).split(), "on", *TONES, *TEXTURES, "ground")

MAX_CROP_SHIFT = 0.1
MARGIN = 0.02
GAP = 0.05
SHORT_SIDE = (96, 192)
MAX_ASPECT = 4 / 3
TRIANGLE_HEIGHT = 0.5 * 3**0.5
CROSS_ARM = 1 / 3


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: the centre of its box; width: of its box; both in short sides. size: a key of SIZES."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    width: float

    @property
    def height(self) -> float:
        return self.width * (TRIANGLE_HEIGHT if self.shape == "triangle" else 1.0)

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows. width, height: in pixels.  grain: seed of what the caption does not describe."""

    width: int
    height: int
    things: tuple[Thing, ...]
    relation: str | None
    tone: str
    texture: str
    grain: int

    @property
    def caption(self) -> str:
        if self.relation is None:
            return f"{self.things[0].phrase} on a {self.tone} {self.texture} ground"
        return f"{self.things[0].phrase} {self.relation} {self.things[1].phrase}"

    def box(self, thing: Thing) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a thing in pixels."""
        unit = min(self.width, self.height)
        x, y, dx, dy = (unit * v for v in (thing.x, thing.y, thing.width / 2, thing.height / 2))
        return (x - dx, y - dy, x + dx, y + dy)


def describe(seed: int, index: int) -> Scene:
    """Scene number `index` of the dataset with this seed. It does not depend on the other scenes."""
    rng = np.random.default_rng([seed, index])
    width, height = _picture_size(rng)
    relation = None if rng.random() < 1 / 3 else _pick(rng, RELATIONS)
    colours = rng.permutation(list(COLOURS))
    kinds = []
    for colour in colours[: 1 if relation is None else 2]:
        size = _pick(rng, tuple(SIZES))
        kinds.append((_pick(rng, SHAPES), str(colour), size, float(rng.uniform(*SIZES[size]))))
    area = _always_visible(width, height)
    things: tuple[Thing, ...]
    if relation is None:
        shape, colour, size, extent = kinds[0]
        things = (Thing(shape, colour, size, *_place(rng, area, extent), extent),)
    else:
        things = _place_two(rng, area, kinds, relation)
    return Scene(
        width, height, things, relation, _pick(rng, tuple(TONES)), _pick(rng, TEXTURES), int(rng.integers(2**31))
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image, with antialiased edges."""
    rng = np.random.default_rng(scene.grain)
    pixels = _ground(scene, rng)
    rows, columns = np.mgrid[0.5 : scene.height, 0.5 : scene.width].astype(np.float32)
    unit = min(scene.width, scene.height)
    for thing in scene.things:
        paint = np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10, 3)
        cover = coverage(thing.shape, columns - unit * thing.x, rows - unit * thing.y, unit * thing.width)[..., None]
        pixels += cover * (paint - pixels)
    pixels += rng.normal(0, 3, pixels.shape)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), "RGB")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """The share of each pixel that a shape covers, in [0, 1].

    x, y: the pixels' offsets from the centre of the shape's box, in pixels, y downwards.  width: of the box, in pixels.
    Raises: ValueError if there is no such shape.
    """
    half = width / 2
    if shape == "circle":
        inside = half - np.hypot(x, y)
    elif shape == "square":
        inside = half - np.maximum(abs(x), abs(y))
    elif shape == "triangle":
        bottom = half * TRIANGLE_HEIGHT
        # The slanted sides rise at 60 degrees; the distance to them is taken along their normal.
        inside = np.minimum(bottom - y, (y + bottom) * 0.5 - abs(x) * TRIANGLE_HEIGHT)
    elif shape == "cross":
        arm = half * CROSS_ARM
        upright = np.minimum(arm - abs(x), half - abs(y))
        inside = np.maximum(upright, np.minimum(half - abs(x), arm - abs(y)))
    else:
        raise ValueError(f"no shape is called '{shape}'; known: {', '.join(SHAPES)}")
    return np.clip(inside + 0.5, 0, 1)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels. A quarter of the pictures are square, the others landscape or portrait."""
    short = int(rng.integers(SHORT_SIDE[0], SHORT_SIDE[1] + 1))
    if rng.random() < 0.25:
        return short, short
    long = int(short * rng.uniform(1, MAX_ASPECT))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _always_visible(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, in short sides, of the area that every shifted square crop contains."""
    short = min(width, height)

    def span(side: int) -> tuple[float, float]:
        lost = (side - short) / 2 + min((side - short) / 2, MAX_CROP_SHIFT * side)
        return lost / short + MARGIN, (side - lost) / short - MARGIN

    (left, right), (top, bottom) = span(width), span(height)
    return left, top, right, bottom


def _place(rng: np.random.Generator, area: tuple[float, float, float, float], extent: float) -> tuple[float, float]:
    left, top, right, bottom = area
    half = extent / 2
    return float(rng.uniform(left + half, right - half)), float(rng.uniform(top + half, bottom - half))


def _place_two(
    rng: np.random.Generator,
    area: tuple[float, float, float, float],
    kinds: list[tuple[str, str, str, float]],
    relation: str,
) -> tuple[Thing, Thing]:
    """Two things with a gap along the relation's axis and a smaller offset across it."""
    along, across = (0, 1) if relation in ("left of", "right of") else (1, 0)
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    first, second = kinds[order[0]][3], kinds[order[1]][3]
    slack = area[along + 2] - area[along] - first - second - GAP
    before, between = np.sort(rng.uniform(0, slack, 2))
    start = area[along] + before + first / 2
    end = start + first / 2 + GAP + (between - before) + second / 2

    low, high = area[across], area[across + 2]
    start_across = rng.uniform(low + first / 2, high - first / 2)
    reach = 0.5 * (end - start)
    end_across = rng.uniform(max(low + second / 2, start_across - reach), min(high - second / 2, start_across + reach))
    centres = {order[0]: (start, start_across), order[1]: (end, end_across)}
    made = []
    for number, (shape, colour, size, extent) in enumerate(kinds):
        centre = centres[number]
        made.append(Thing(shape, colour, size, float(centre[along]), float(centre[across]), extent))
    return made[0], made[1]


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The ground [H, W, 3] float in [0, 255]: nearly colourless pixels around the scene's tone."""
    rows, columns = np.mgrid[0.5 : scene.height, 0.5 : scene.width].astype(np.float32)
    period = min(scene.width, scene.height) * rng.uniform(0.12, 0.2)
    wave = 2 * np.pi / period
    edge = period / 4
    if scene.texture == "striped":
        angle = rng.uniform(0, np.pi)
        pattern = np.clip(edge * np.sin(wave * (columns * np.cos(angle) + rows * np.sin(angle))), -1, 1)
    elif scene.texture == "checked":
        pattern = np.clip(edge * np.sin(wave * columns), -1, 1) * np.clip(edge * np.sin(wave * rows), -1, 1)
    elif scene.texture == "spotted":
        pattern = np.clip(edge * (np.cos(wave * columns) + np.cos(wave * rows) - 0.9), -1, 1)
    else:
        coarse = Image.fromarray(rng.normal(0, 0.6, (24, 24)).astype(np.float32), "F")
        pattern = np.asarray(coarse.resize((scene.width, scene.height), Image.Resampling.BILINEAR))
    tint = rng.uniform(-6, 6, 3)
    tone = TONES[scene.tone] + rng.uniform(-12, 12)
    return tone + tint + rng.uniform(10, 18) * pattern[..., None] * np.ones(3)
