"""From the bytes of an image to the pixels that the network sees."""

import io

import numpy as np
from PIL import Image

# A picture may unpack to far more memory than its file takes; what is above this is refused before it is decoded.
MAX_PIXELS = 64_000_000


class BadImage(ValueError):
    """The image cannot be used; the message is the reason under which it is counted."""


def decode(data: bytes) -> Image.Image:
    """JPEG or PNG bytes to an RGB image, transparency laid on white, EXIF rotation not applied.

    Other formats are not even tried, since Pillow 9.2.0 has known holes in some of their decoders.
    Raises: BadImage.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG"])
        if image.width * image.height > MAX_PIXELS:
            raise BadImage("too many pixels")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage("unreadable image") from error


def shifted_center_box(width: int, height: int, shift: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The largest square, moved from the centre by up to `shift` of its side on each axis, kept inside the image.

    Returns: left, upper, right, lower in pixels.  Source: the model card's words, as read in docs/recipe.md.
    """
    side = min(width, height)
    dx, dy = rng.uniform(-shift, shift, size=2) * side
    left = min(max(round((width - side) / 2 + dx), 0), width - side)
    upper = min(max(round((height - side) / 2 + dy), 0), height - side)
    return left, upper, left + side, upper + side


def preprocess(data: bytes, image_size: int, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Image bytes to uint8 [3, image_size, image_size]: decode, shifted centre crop, Pillow BICUBIC.

    Raises: BadImage.
    """
    image = decode(data)
    # Cropped first: resize(box=...) would let the filter reach over the edge of the crop.
    image = image.crop(shifted_center_box(image.width, image.height, shift, rng))
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, reducing_gap=None)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
