"""How a picture comes out of the noise: a contact sheet of the sampler's steps."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw

from data.inspection.contact_sheet import printable, sheet_font, to_image
from train.sampling.sampler import SamplingStep, to_pixels

# Most steps on a sheet, spread evenly from the first to the last.
MOST, COLUMNS = 100, 10
# In pixels; so wide are the letters of a title in capitals.
GAP, LINE, LETTER = 8, 15, 8


class StepsSheet:
    """Keeps of each step that it is called with the first image of the batch."""

    def __init__(self) -> None:
        self.timesteps: list[int] = []
        self.noisy: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []

    def __call__(self, step: SamplingStep) -> None:
        """Keep x_t and the prediction as pixels."""
        self.timesteps.append(step.t)
        self.noisy.append(to_pixels(step.x_t[0]).numpy())
        self.predicted.append(to_pixels(step.pred_xstart[0]).numpy())

    def draw(self, title: str) -> Image.Image:
        """The sheet: under its title the steps in rows, of each x_t, below it pred_xstart, and its timestep."""
        shown = np.unique(np.linspace(0, len(self.timesteps) - 1, min(MOST, len(self.timesteps))).round().astype(int))
        size = self.noisy[0].shape[-1]
        side = size * max(1, 96 // size)
        width, height = side + GAP, 2 * side + LINE + GAP
        columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
        across = max(columns * width, 400)
        font = sheet_font(11)
        of = "all" if len(shown) == len(self.timesteps) else f"{len(shown)} of the"
        lines = textwrap.wrap(printable(title, 200), (across - GAP) // LETTER)
        lines.append(f"{of} {len(self.timesteps)} steps; above x_t, below pred_xstart")
        head = len(lines) * LINE + 2 * GAP
        sheet = Image.new("RGB", (across + GAP, rows * height + head), "white")
        pen = ImageDraw.Draw(sheet)
        for line, words in enumerate(lines):
            pen.text((GAP, GAP + line * LINE), words, fill="black", font=font)
        for place, number in enumerate(shown):
            left, top = GAP + place % COLUMNS * width, head + place // COLUMNS * height
            for row, pixels in enumerate((self.noisy[number], self.predicted[number])):
                tile = to_image(pixels).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(tile, (left, top + row * side))
            pen.text((left, top + 2 * side), f"t = {self.timesteps[number]}", fill="black", font=font)
        return sheet
