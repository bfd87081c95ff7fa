"""Odd and hostile images: each has the outcome in docs/reference/hostile_input.md, and no bytes do anything else."""

import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from data.config import ImageRules
from data.images import BadImage, decode

REASONS = {
    "not a JPEG or PNG", "too many bytes", "too many pixels", "too many scans", "truncated image", "corrupt image",
}  # fmt: skip
WITH_WEBP = ImageRules(allow_webp=True)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


PICTURE = Image.fromarray(noise(64, 48))
JPEG = encoded(PICTURE, "JPEG")
PNG = encoded(PICTURE)


def pixels(data: bytes, rules: ImageRules | None = None) -> np.ndarray:
    image = decode(data, rules or ImageRules())
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, kind: int, rows: bytes, *extra: bytes, interlaced: int = 0) -> bytes:
    """A PNG by hand. kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. rows: each with its filter byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows(samples: np.ndarray, bits: int = 8) -> bytes:
    """Samples [height, width * channels] as unfiltered PNG rows."""
    if bits == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    bit = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return b"".join(b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bit)


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    """The JPEG with one more segment, ahead of all others but without the JFIF one."""
    jfif = 2 + 2 + struct.unpack(">H", jpeg[4:6])[0]
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[jfif:]


def exif_of(orientation: int, order: str = ">") -> bytes:
    mark = {">": b"MM\0*", "<": b"II*\0"}[order]
    entry = struct.pack(order + "HHLHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "LH", 8, 1) + entry + b"\0\0\0\0"


def scan_bomb(scans: int) -> bytes:
    jpeg = encoded(Image.new("L", (512, 512), 77), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * scans + b"\xff\xd9"


REFUSED = {
    "nothing": (b"", "not a JPEG or PNG"),
    "text": (b"<html>404</html>", "not a JPEG or PNG"),
    "gif": (encoded(PICTURE, "GIF"), "not a JPEG or PNG"),
    "tiff": (encoded(PICTURE, "TIFF"), "not a JPEG or PNG"),
    "webp": (encoded(PICTURE, "WEBP"), "not a JPEG or PNG"),
    "pickle": (pickle.dumps(noise(8, 8)), "not a JPEG or PNG"),
    "jpeg cut in its header": (JPEG[:100], "truncated image"),
    "jpeg cut in its data": (JPEG[: len(JPEG) // 2], "truncated image"),
    "jpeg without its end": (JPEG[:-2], "truncated image"),
    "jpeg of three bytes": (JPEG[:3], "truncated image"),
    "png cut in its header": (PNG[:20], "truncated image"),
    "png cut in its data": (PNG[: len(PNG) // 2], "truncated image"),
    "png signature alone": (PNG[:8], "truncated image"),
    "jpeg without height": (resized(JPEG, 64, 0), "corrupt image"),
    "jpeg of 12 bits": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "corrupt image"),
    "png without width": (png(0, 4, 8, 0, rows(noise(4, 4)[..., 0])), "corrupt image"),
    "png of no known kind": (png(4, 4, 8, 5, rows(noise(4, 4)[..., 0])), "corrupt image"),
    "png with a wrong checksum": (PNG.replace(b"IHDR\0\0\0\x40", b"IHDR\0\0\0\x41"), "corrupt image"),
    "png with broken data": (PNG.replace(PNG[60:80], bytes(20)), "corrupt image"),
    "png with 2 MB of text in 2 KB": (
        png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))), "corrupt image",
    ),
    "png with 2 MB of profile": (
        png(1, 1, 8, 0, b"\0\0", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21)))), "corrupt image",
    ),
    "png with 70 MB of text": (
        png(1, 1, 8, 0, b"\0\0", *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))] * 70), "corrupt image",
    ),
    "png whose comment poses as its transparency": (
        png(1, 1, 8, 2, b"\0\0\0\0", chunk(b"tEXt", b"transparency\0white")), "corrupt image",
    ),
    "png of 81 million pixels without any": (png(9000, 9000, 1, 0, b""), "too many pixels"),
    "png of the largest size": (png(2**31 - 1, 2**31 - 1, 8, 6, b""), "too many pixels"),
    "jpeg of 4 billion pixels": (resized(JPEG, 65500, 65500), "too many pixels"),
    "jpeg that claims what no bytes could hold": (resized(JPEG, 8000, 7999), "truncated image"),
    "png that claims what no bytes could hold": (png(8000, 7999, 1, 0, b""), "truncated image"),
    "jpeg of a thousand scans": (scan_bomb(1000), "too many scans"),
    "too long a file": (JPEG + bytes(32 * 2**20), "too many bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_for_its_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(BadImage) as refused:
        decode(data)
    assert str(refused.value) == reason


def test_the_limits_are_those_of_the_rules():
    assert decode(PNG, ImageRules(max_pixels=64 * 48, max_bytes=len(PNG))).size == (64, 48)
    with pytest.raises(BadImage, match="too many pixels"):
        decode(PNG, ImageRules(max_pixels=64 * 48 - 1))
    with pytest.raises(BadImage, match="too many bytes"):
        decode(PNG, ImageRules(max_bytes=len(PNG) - 1))
    for wrong in ({"background": 256}, {"max_pixels": 0}, {"max_pixels": 10**9}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            ImageRules(**wrong)


def test_files_that_pack_as_many_pixels_into_a_byte_as_can_be_are_taken():
    for size in ((8000, 8000), (30, 5)):
        assert (
            decode(encoded(Image.new("L", size, 128), "JPEG", quality=1, optimize=True, progressive=True)).size == size
        )
        assert decode(encoded(Image.new("1", size), optimize=True)).size == size


def test_a_long_metadata_tail_is_no_scan_bomb():
    tail = np.random.default_rng(0).bytes(20 * 2**20)
    assert tail.count(b"\xff\xda") > 200
    assert (pixels(JPEG + tail) == pixels(JPEG)).all()


def test_nothing_that_other_libraries_switch_makes_up_missing_pixels(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImage, match="truncated image"):
        decode(JPEG[: len(JPEG) // 2])


def test_a_jpeg_that_lies_about_its_height_is_taken_as_its_header_says():
    honest = pixels(JPEG)
    assert (pixels(resized(JPEG, 64, 32))[:24] == honest[:24]).all(), "what is too much is left"
    taller = pixels(resized(JPEG, 64, 96))
    assert (taller[:40] == honest[:40]).all() and (taller[66:] == 128).all(), "what is missing is grey"
    assert (pixels(JPEG[: len(JPEG) // 2] + b"\xff\xd9")[-8:] == 128).all(), "the same where an end is put too early"


def test_a_png_whose_data_ends_early_is_black_from_there():
    samples = noise(16, 16, 1)[..., 0]
    found = pixels(png(16, 16, 8, 0, rows(samples)[: 17 * 8]))
    assert (found[:8, :, 0] == samples[:8]).all() and (found[8:] == 0).all()


def test_what_follows_the_end_does_not_matter():
    for data in (JPEG, PNG):
        assert (pixels(data + b"anything") == pixels(data)).all()


def test_cmyk_is_inks_on_white():
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0], inks[8:, :, 3], inks[:, 8:, 1] = 255, 100, 60
    cmyk = Image.fromarray(inks, "CMYK")
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    found = pixels(encoded(cmyk, "JPEG", quality=100, subsampling=0))
    assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_sixteen_bits_become_the_upper_eight(kind):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    values = np.random.default_rng(kind).integers(0, 2**16, (9, 7 * channels), dtype=np.uint16)
    if kind in (4, 6):
        values.reshape(9, 7, channels)[..., -1] = 65535
    found = pixels(png(7, 9, 16, kind, rows(values, 16)))
    colours = values.reshape(9, 7, channels)[..., : 3 if kind in (2, 6) else 1]
    assert (found == colours >> 8).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_greys_of_few_bits_reach_from_black_to_white(bits):
    values = np.arange(64).reshape(8, 8) % 2**bits
    found = pixels(png(8, 8, bits, 0, rows(values, bits)))
    assert (found == (values * 255 // (2**bits - 1))[..., None]).all()


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_with_and_without_transparency(bits, background):
    colours = noise(2**bits, 1)[0].astype(int)
    index = np.arange(64).reshape(8, 8) % 2**bits
    palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    assert (pixels(png(8, 8, bits, 3, rows(index, bits), palette)) == colours[index]).all()
    for some in (b"\x00", b"\x80\x40"):  # the alpha of the first entries; the others are opaque
        alpha = np.full(2**bits, 255)
        alpha[: len(some)] = list(some)
        expected = laid_on(colours[index], alpha[index], background)
        found = pixels(
            png(8, 8, bits, 3, rows(index, bits), palette, chunk(b"tRNS", some)), ImageRules(background=background)
        )
        assert np.abs(found - expected).max() <= 1


def laid_on(colours: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colours * share + background * (1 - share))


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_the_background_and_not_what_it_hid(mode, background):
    image = Image.fromarray(noise(32, 32, 4), "RGBA").convert(mode)
    *colours, alpha = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    expected = laid_on(np.stack(colours, -1), alpha, background)
    assert np.abs(pixels(encoded(image), ImageRules(background=background)) - expected).max() <= 1
    hidden = np.array(image)
    hidden[..., -1] = 0
    assert (pixels(encoded(Image.fromarray(hidden, mode))) == 255).all(), "white by default"


@pytest.mark.parametrize(("kind", "bits", "key"), [(0, 8, (7,)), (0, 16, (300,)), (2, 8, (7, 8, 9))])
def test_a_transparent_colour_shows_the_background(kind, bits, key):
    values = np.full((4, 4, len(key)), 40)
    values[:2] = key
    values[2] = np.array(key) + 1
    data = png(4, 4, bits, kind, rows(values.reshape(4, -1), bits), chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    found = pixels(data)
    assert (found[:2] == 255).all() and (found[2:] == values[2:] >> (bits - 8)).all()


def test_interlaced_pngs_are_read():
    samples = noise(20, 13, 1)[..., 0]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b"".join(rows(samples[y::dy, x::dx]) for x, y, dx, dy in passes if samples[y::dy, x::dx].size)
    assert (pixels(png(20, 13, 8, 0, data, interlaced=1)) == samples[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_stand_as_their_exif_tag_says(orientation, order, kind):
    data = encoded(PICTURE, kind, exif=exif_of(orientation, order))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (expected.size == (48, 64)) == (orientation > 4), "the tag was written"
    assert (pixels(data) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*",
        exif_of(0),
        exif_of(9),
        exif_of(6)[:20],
        exif_of(6)[:14] + b"\xff" * 8,
        b"\xff" * 60,
    ],
)
def test_an_exif_block_that_makes_no_sense_turns_nothing(exif):
    assert (pixels(with_segment(JPEG, 0xE1, exif)) == pixels(JPEG)).all()
    assert (pixels(PNG[:33] + chunk(b"eXIf", exif[6:]) + PNG[33:]) == pixels(PNG)).all()


def test_a_costly_exif_block_is_not_parsed():
    entries = b"".join(struct.pack(">HHLL", 1000 + i, 7, 60_000, 8) for i in range(5000))
    bomb = (b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 5000) + entries).ljust(65_000, b"\0")
    data = with_segment(JPEG, 0xE1, bomb)
    tracemalloc.start()
    try:
        assert (pixels(data) == pixels(JPEG)).all()
        assert tracemalloc.get_traced_memory()[1] < 10e6, "Pillow alone takes 300 MB"
    finally:
        tracemalloc.stop()


def test_an_animation_takes_no_memory_before_its_size_is_judged(repo):
    """In a process of its own with 2 GB of addresses, where Pillow alone takes 16 GB for this file."""
    frame = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 1, 0)
    data = png(2**16, 2**16, 8, 6, b"", chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", frame))
    done = subprocess.run([sys.executable, "-c", IN_TWO_GB], cwd=repo, input=data, capture_output=True, timeout=60)
    assert done.stdout.split() == [b"MemoryError", b"too", b"many", b"pixels"], done.stderr.decode()


IN_TWO_GB = """
import io, resource, sys
from PIL.PngImagePlugin import PngImageFile
from data.images import BadImage, decode
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
data = sys.stdin.buffer.read()
for read in (lambda: PngImageFile(io.BytesIO(data)), lambda: decode(data)):
    try:
        read()
    except MemoryError:
        print("MemoryError")
    except BadImage as bad:
        print(bad)
"""


def test_colour_profiles_are_not_applied():
    for kind, data in (("JPEG", JPEG), ("PNG", PNG)):
        assert (pixels(encoded(PICTURE, kind, icc_profile=b"any profile" * 50)) == pixels(data)).all()


def test_the_first_picture_of_an_animation_is_taken():
    frames = [Image.new("RGB", (20, 16), colour) for colour in ("red", "lime", "blue")]
    red = np.array([255, 0, 0])
    assert (pixels(encoded(frames[0], save_all=True, append_images=frames[1:])) == red).all()
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(webp, WITH_WEBP) == red).all()
    # A JPEG of several pictures, as phones write: its index, sound or not, is not read.
    assert (
        pixels(with_segment(JPEG, 0xE2, b"MPF\0" + b"MM\0*\0\0\0\x08\0\x03" + bytes(50)) + JPEG) == pixels(JPEG)
    ).all()


def test_webp_is_read_only_by_choice():
    image = Image.fromarray(noise(16, 16, 4), "RGBA")
    data = encoded(image, "WEBP", lossless=True, exact=True)
    with pytest.raises(BadImage, match="not a JPEG or PNG"):
        decode(data)
    assert np.abs(pixels(data, WITH_WEBP) - pixels(encoded(image))).max() <= 1
    with pytest.raises(BadImage, match="truncated image"):
        decode(data[:-2], WITH_WEBP)
    with pytest.raises(BadImage, match="too many pixels"):
        decode(data, ImageRules(allow_webp=True, max_pixels=255))
    with pytest.raises(BadImage, match="not a JPEG or PNG"):
        decode(encoded(image.convert("RGB"), "GIF"), WITH_WEBP)


def test_no_warning_reaches_the_terminal(recwarn):
    decode(png(1, 1, 8, 0, b"\0\0", chunk(b"acTL", bytes(8))))
    decode(with_segment(JPEG, 0xE1, exif_of(6)[:20]))
    with pytest.raises(BadImage):
        decode(png(9000, 10_000, 8, 0, b""))
    assert not recwarn.list


def test_every_reason_is_in_the_table(repo: Path):
    page = (repo / "docs/reference/hostile_input.md").read_text(encoding="utf-8")
    assert {reason for _, reason in REFUSED.values()} == REASONS
    assert not [reason for reason in REASONS if f"`{reason}`" not in page]
