"""The sample grids of a run as a film: what the same prompts and seeds give as the training goes on."""

import io
from collections.abc import Sequence

from PIL import Image

from data.images import BadImage, decode

# Most frames, spread evenly over the grids, and how long each is shown; the last one stays longer.
FRAMES, MILLISECONDS, LAST = 24, 500, 2500
# The film has the first of these widths in pixels with which it has about so many bytes, by three of its frames.
WIDTHS, BYTES = (1000, 700, 500, 350), 3_000_000


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 ... count - 1, evenly, the first and the last among them."""
    last = min(count, most) - 1
    return [i * (count - 1) // max(last, 1) for i in range(last + 1)]


def film(grids: Sequence[bytes]) -> tuple[bytes, int]:
    """A GIF of PNGs, and how many frames it has; those that cannot be decoded are left out.

    Grids of other sizes, as of other prompts, keep their scale. Returns: no bytes if there are less than two frames.
    """
    frames = []
    for grid in grids:
        try:
            frames.append(decode(grid))
        except BadImage:
            continue
    if len(frames) < 2:
        return b"", len(frames)
    size = tuple(max(frame.size[axis] for frame in frames) for axis in (0, 1))
    some = [frames[i] for i in spread(len(frames), 3)]
    for width in WIDTHS:
        scale = min(1.0, width / size[0])
        if len(_gif(some, size, scale)) / len(some) * len(frames) <= BYTES:
            break
    return _gif(frames, size, scale), len(frames)


def _gif(frames: list[Image.Image], size: tuple[int, ...], scale: float) -> bytes:
    scaled = []
    for frame in frames:
        sheet = Image.new("RGB", size, "white")
        sheet.paste(frame)
        small = sheet.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BOX)
        # Dithered, the film would be several times as large.
        scaled.append(small.quantize(256, dither=Image.Dither.NONE))
    times = [MILLISECONDS] * (len(scaled) - 1) + [LAST]
    file = io.BytesIO()
    scaled[0].save(file, "GIF", save_all=True, append_images=scaled[1:], duration=times, loop=0, optimize=False)
    return file.getvalue()
