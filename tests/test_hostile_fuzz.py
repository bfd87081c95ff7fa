"""Damaged and made-up bytes: whatever they are, an image comes of them or a known reason."""

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import ImageRules
from data.images import BadImage, preprocess
from tests.test_hostile import JPEG, PNG, REASONS, chunk, encoded, exif_of, noise, with_segment


def small_files() -> list[bytes]:
    """One of each kind that is read, to be damaged."""
    picture = Image.fromarray(noise(24, 18))
    files = [encoded(picture.convert(mode)) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I")]
    files += [encoded(picture.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")]
    files += [
        encoded(picture, "JPEG", progressive=True, exif=exif_of(6), icc_profile=b"x" * 200, dpi=(300, 300)),
        encoded(picture, exif=exif_of(3), icc_profile=b"x" * 200),
        encoded(picture, save_all=True, append_images=[picture.transpose(Image.Transpose.ROTATE_180)]),
        encoded(picture.quantize(16), transparency=bytes(range(0, 160, 10))),
        with_segment(encoded(picture, "JPEG"), 0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + bytes(16)),
        encoded(picture, "WEBP"),
    ]
    return files


FILES = small_files()
SMALL = ImageRules(allow_webp=True, max_pixels=1_000_000, max_bytes=100_000)


def check_outcome(data: bytes, rules: ImageRules) -> None:
    try:
        found = preprocess(data, 16, 0.1, np.random.default_rng(0), rules)
    except BadImage as bad:
        assert str(bad) in REASONS
    else:
        assert found.shape == (3, 16, 16) and found.dtype == np.uint8


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([b"", JPEG[:3], JPEG[:20], PNG[:8], PNG[:41], b"RIFF\x20\0\0\0WEBPVP8 "]), st.binary(max_size=300)
)
def test_any_bytes_are_an_image_or_bad_for_a_known_reason(start, rest):
    check_outcome(start + rest, SMALL)


edit = st.tuples(
    st.sampled_from(["set", "insert", "delete", "cut", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
)


@settings(deadline=None, max_examples=1500)
@given(st.sampled_from(FILES), st.lists(edit, min_size=1, max_size=4), st.booleans())
def test_any_damage_gives_an_image_or_a_known_reason(data, edits, mend):
    for kind, where, what in edits:
        at = int(where * len(data))
        match kind:
            case "set":
                data = data[:at] + what + data[at + len(what) :]
            case "insert":
                data = data[:at] + what + data[at:]
            case "delete":
                data = data[:at] + data[at + len(what) :]
            case "cut":
                data = data[:at] + data[-len(what) :]
            case "repeat":
                data = data[:at] + data[at : at + 30] * what[0] + data[at:]
    check_outcome(mended(data) if mend else data, SMALL)


def mended(data: bytes) -> bytes:
    """With the checksums of a PNG's chunks made right again, so that the damage gets past them."""
    if not data.startswith(PNG[:8]):
        return data
    found, at = data[:8], 8
    while at + 12 <= len(data):
        length = min(struct.unpack(">I", data[at : at + 4])[0], len(data) - at - 12)
        found += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return found
