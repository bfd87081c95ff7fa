"""The pixels: the card's crop, Pillow's BICUBIC, and what is done with odd images."""

import io

import numpy as np
import pytest
from PIL import Image

from data.draws import Draw, generator
from data.transforms import BadImage, decode, preprocess, shifted_center_box


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (128, 128), (101, 100), (3, 1), (5000, 7)])
def test_the_crop_is_the_largest_square_shifted_by_at_most_a_tenth_and_never_outside(size):
    width, height = size
    side = min(size)
    lefts = set()
    for i in range(300):
        left, upper, right, lower = shifted_center_box(width, height, 0.1, generator(0, Draw.CROP, i))
        assert right - left == lower - upper == side
        assert left >= 0 and right <= width and upper >= 0 and lower <= height
        assert abs(left - (width - side) / 2) <= 0.1 * side + 0.5
        assert abs(upper - (height - side) / 2) <= 0.1 * side + 0.5
        lefts.add(left)
    if width == 200:
        assert min(lefts) == 40 and max(lefts) == 60, "the whole range is used"


def test_pixels_are_those_of_crop_then_resize():
    # Large enough that a reducing_gap would first shrink it by whole numbers.
    image = noise_image(650, 490)
    rng = generator(3, Draw.CROP, 5)
    left, upper, right, lower = shifted_center_box(650, 490, 0.1, generator(3, Draw.CROP, 5))
    expected = np.asarray(
        image.crop((left, upper, right, lower)).resize((64, 64), Image.Resampling.BICUBIC, reducing_gap=None)
    )
    found = preprocess(encoded(image), 64, 0.1, rng)
    assert found.shape == (3, 64, 64) and found.dtype == np.uint8
    assert (found == expected.transpose(2, 0, 1)).all()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(decode(encoded(image))).min() == 255


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = noise_image(16, 16).convert(mode)
    assert decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG")).mode == "RGB"


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(noise_image(64, 64), "JPEG")[:300], encoded(noise_image(8, 8), "GIF")],
    ids=["empty", "text", "truncated jpeg", "gif"],
)
def test_what_cannot_be_read_is_bad(data):
    with pytest.raises(BadImage):
        decode(data)


def test_too_many_pixels_are_refused_before_decoding():
    header = encoded(Image.new("1", (9000, 9000)))
    with pytest.raises(BadImage, match="too many pixels"):
        decode(header)
