"""The pixels: the card's crop and Pillow's BICUBIC. Odd images: test_hostile.py."""

import io

import numpy as np
import pytest
from PIL import Image

from data.images import crop, decode, preprocess, resize, shifted_center_box
from data.loader.draws import Draw, generator


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
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


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0})]
)
def test_pixels_are_those_of_crop_then_resize(kind, options):
    # Large enough that a reducing_gap would first shrink it by whole numbers, and a draft would decode it smaller.
    data = encoded(noise_image(650, 490), kind, **options)
    left, upper, right, lower = shifted_center_box(650, 490, 0.1, generator(3, Draw.CROP, 5))
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(
        decoded.crop((left, upper, right, lower)).resize((64, 64), Image.Resampling.BICUBIC, reducing_gap=None)
    )
    found = preprocess(data, 64, 0.1, generator(3, Draw.CROP, 5))
    assert found.shape == (3, 64, 64) and found.dtype == np.uint8
    assert (found == expected.transpose(2, 0, 1)).all()


def test_a_small_and_a_large_image_of_one_crop_are_each_as_if_alone():
    data = encoded(noise_image(650, 490), "JPEG")
    square = crop(decode(data), 0.1, generator(3, Draw.CROP, 5))
    for size in (256, 64, 16):
        assert (resize(square, size) == preprocess(data, size, 0.1, generator(3, Draw.CROP, 5))).all(), size


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_smallest_and_the_longest_pictures_are_taken(size, kind):
    data = encoded(Image.new("RGB", size, (200, 100, 50)), kind)
    found = preprocess(data, 64, 0.1, generator(0, Draw.CROP, 0))
    assert found.shape == (3, 64, 64)
    assert np.abs(found.astype(int) - np.array([200, 100, 50])[:, None, None]).max() <= 2


def test_real_pictures_are_as_pillow_alone_makes_them(shared):
    tars = pytest.importorskip("data.storage.tars")
    shards = sorted((shared / "data" / "fluent").glob("*.tar"))
    if not shards:
        pytest.skip("no img2dataset shards")
    for _, members in tars.read_shard(shards[0], {"jpg"}):
        image = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
        box = shifted_center_box(*image.size, 0.1, generator(0, Draw.CROP, 0))
        expected = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BICUBIC))
        assert (preprocess(members["jpg"], 64, 0.1, generator(0, Draw.CROP, 0)) == expected.transpose(2, 0, 1)).all()
