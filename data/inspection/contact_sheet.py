"""One picture of many samples, as the network sees them, with their captions; and captions made safe to display."""

import textwrap
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.inspection.findings import Tile

COLUMNS, SCALE, LINES = 8, 2, 4
MARGIN, LINE_HEIGHT, LETTER = 10, 14, 11
# Zero-width joiners are part of ordinary text: emoji, Persian, the scripts of India.
JOINERS = "\u200c\u200d"


def printable(caption: str, max_length: int) -> str:
    """A caption as one line of at most max_length characters.

    Characters that are invisible or change the direction of the text are written as their code points.
    """
    cut = " ".join(caption[: max_length * 4].split())
    safe = "".join(
        c if c in JOINERS or unicodedata.category(c)[0] not in "CZ" or c == " " else _code_point(c) for c in cut
    )
    return safe if len(safe) <= max_length and len(caption) <= max_length * 4 else safe[: max_length - 1] + "…"


def _code_point(character: str) -> str:
    return " " if unicodedata.category(character) == "Zs" else f"[U+{ord(character):04X}]"


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [3, S, S] as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def sheet_font(size: int) -> ImageFont.FreeTypeFont:
    """A font of this size in pixels. Pillow's own has Latin letters only; this one comes with matplotlib."""
    import matplotlib  # here, since its import is slow

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def contact_sheet(tiles: list[Tile]) -> Image.Image:
    """All tiles in rows, at twice their size, each above its caption; on the right, in red frames, what rules took.

    Raises: ValueError if there are none.
    """
    if not tiles:
        raise ValueError("none of the samples looked at can be shown: see their reasons in an .html report")
    font = sheet_font(LETTER)
    side = max(tiles[0].pixels.shape[-1] * SCALE, 96)
    width, height = side + MARGIN, side + LINES * LINE_HEIGHT + MARGIN + 4
    slots = _slots(tiles)
    columns, rows = (max(place[axis] for place in slots) + 1 for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for (column, row), tile in zip(slots, tiles, strict=True):
        left, top = column * width + MARGIN, row * height + MARGIN
        if tile.taken:
            pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), fill="red")
        sheet.paste(to_image(tile.pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for line, words in enumerate(_lines(_shown(tile.captions), font, side)):
            pen.text((left, top + side + 3 + line * LINE_HEIGHT), words, fill="black", font=font)
    return sheet


def _slots(tiles: list[Tile]) -> list[tuple[int, int]]:
    """The column and row of each tile; where rules took some, these are in the right half."""
    taken = sum(tile.taken > 0 for tile in tiles)
    if not taken:
        return [(number % COLUMNS, number // COLUMNS) for number in range(len(tiles))]
    half, used, slots = COLUMNS // 2, [0, 0], []
    for tile in tiles:
        right = tile.taken > 0
        slots.append((right * half + used[right] % half, used[right] // half))
        used[right] += 1
    return slots


def _shown(captions: dict[str, str]) -> str:
    """The caption of a sample; of several each with its field."""
    if len(captions) == 1:
        return printable(next(iter(captions.values())), 200)
    return " ".join(f"{name}: {printable(text, 200 // len(captions))}" for name, text in captions.items())


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most LINES lines that are not wider than the picture."""
    letters = next(n for n in range(60, 0, -1) if n == 1 or font.getlength("e" * n) <= width)
    lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder="…") or ["(no caption)"]
    fitting = []
    for line in lines:
        while font.getlength(line) > width:
            line = line[:-1]
        fitting.append(line)
    return fitting
