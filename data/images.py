"""From the bytes of an image to the pixels that the network sees; odd images: docs/reference/hostile_input.md."""

import errno
import io
import os
import struct
import warnings

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from data.config import ImageRules
from data.storage.machine import raise_if_machine

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# The formats by which `sniff` calls a file: where its marks lie, and the marks. Only the first three are ever decoded.
FORMATS: dict[str, tuple[int, tuple[bytes, ...]]] = {
    "JPEG": (0, (JPEG,)),
    "PNG": (0, (PNG,)),
    "WebP": (8, (b"WEBP",)),
    "GIF": (0, (b"GIF87a", b"GIF89a")),
    "BMP": (0, (b"BM",)),
    "TIFF": (0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "AVIF": (4, (b"ftypavif", b"ftypavis")),
    "HEIC": (4, (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")),
    "JPEG XL": (0, (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")),
    "JPEG 2000": (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    "PSD": (0, (b"8BPS\0\x01",)),
}
# The first bytes of a file that tell its format.
HEAD = 16
# The end mark is searched in so many last bytes, since some tools append a little to a file.
TAIL = 1024
# The most pixels that a byte can encode: JPEG spends a bit on each 8 x 8 block, and deflate packs 1,032 bytes into one,
# each of 8 pixels at 1 bit.
MAX_PIXELS_PER_BYTE = {"JPEG": 512, "PNG": 8256}
# Real files have 1 to 20 scans. Each costs a pass over the whole image, however few bytes it takes.
MAX_SCANS = 100
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """The image cannot be used. The message is the reason under which it is counted, one of a fixed set."""


DEFAULT_RULES = ImageRules()


def sniff(head: bytes) -> str:
    """The format of a picture by the first HEAD bytes of its file, a name in FORMATS; '' for what is none of them."""
    for name, (offset, marks) in FORMATS.items():
        if head.startswith(marks, offset) and not (
            (name == "WebP" and not head.startswith(b"RIFF"))
            or (name == "BMP" and head[6:10] != bytes(4))  # reserved; two letters alone may begin a text
        ):
            return name
    return ""


def preprocess(
    data: bytes, image_size: int, shift: float, rng: np.random.Generator, rules: ImageRules = DEFAULT_RULES
) -> np.ndarray:
    """Image bytes to uint8 [3, image_size, image_size]: decode, shifted centre crop, Pillow's BICUBIC resize.

    shift: as for shifted_center_box.
    Raises: BadImage.
    """
    return resize(crop(decode(data, rules), shift, rng), image_size)


def crop(image: Image.Image, shift: float, rng: np.random.Generator) -> Image.Image:
    """The shifted centre square of a decoded image."""
    # Cropped before it is resized, since with resize(box=...) the filter would reach beyond the crop.
    box = shifted_center_box(image.width, image.height, shift, rng)
    return image if box == (0, 0, *image.size) else image.crop(box)  # crop() would copy the whole image


def resize(square: Image.Image, image_size: int) -> np.ndarray:
    """What crop returned to uint8 [3, image_size, image_size]."""
    resized = square.resize((image_size, image_size), Image.Resampling.BICUBIC, reducing_gap=None)
    return np.asarray(resized).transpose(2, 0, 1)


def shifted_center_box(width: int, height: int, shift: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The largest square, moved from the centre by at most `shift` of its side on each axis, within the image.

    Returns: left, upper, right, lower in pixels.  Source: the model card's words, as read in docs/recipe.md.
    """
    side = min(width, height)
    dx, dy = (shift * (2 * rng.random() - 1) * side for _ in range(2))
    left = min(max(round((width - side) / 2 + dx), 0), width - side)
    upper = min(max(round((height - side) / 2 + dy), 0), height - side)
    return left, upper, left + side, upper + side


def decode(data: bytes, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """JPEG or PNG bytes to an RGB image, turned upright by its EXIF tag, with transparency over the background.

    Raises: BadImage; MachineError if the memory is used up.
    """
    if len(data) > rules.max_bytes:
        raise BadImage("too many bytes")
    # Other libraries set this, and Pillow then fills in what is missing.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data, rules)
            image.load()
            return _upright_rgb(image, rules.background)
        except BadImage:
            raise
        except MemoryError as error:
            _check_memory(rules)
            raise BadImage("corrupt image") from error
        except Exception as error:  # for damaged bytes Pillow's decoders raise errors of many types
            raise BadImage("truncated image" if _has_no_end(data) else "corrupt image") from error


def _check_memory(rules: ImageRules) -> None:
    """Raises: MachineError if there is no memory for the largest image that may be decoded, whatever this one is."""
    try:
        bytearray(4 * rules.max_pixels)
    except MemoryError:
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        raise_if_machine(error, f"an image of up to data.images.max_pixels={rules.max_pixels}")


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF is not searched for a resolution, for which 64 KB of EXIF can take 300 MB of memory."""

    def _open(self) -> None:
        self.info["dpi"] = (72, 72)
        super()._open()


class _Png(PngImageFile):
    """A PNG without its further frames, for which Pillow would allocate memory before the size is checked."""

    def _seek(self, frame: int, rewind: bool = False) -> None:
        self._prev_im = None


def _open(data: bytes, rules: ImageRules) -> ImageFile.ImageFile:
    """The image, with its header read and checked. The first bytes decide its format, not Pillow's registry.

    Raises: BadImage; an error of any type for a damaged header.
    """
    file = io.BytesIO(data)
    image: ImageFile.ImageFile
    form = sniff(data[:HEAD])
    if form == "JPEG":
        image = _Jpeg(file)
        # After the image there may be other data, in which the two bytes appear by chance once in 2**16.
        coded = np.frombuffer(data, np.uint8, offset=file.tell())
        scans = np.count_nonzero((coded[:-1] == 0xFF) & (coded[1:] == 0xDA))  # in a fifth of the time of bytes.count
        if scans > MAX_SCANS + len(data) // 2**15:
            raise BadImage("too many scans")
    elif form == "PNG":
        image = _Png(file)
    elif form == "WebP" and rules.allow_webp:
        from PIL.WebPImagePlugin import WebPImageFile

        image = WebPImageFile(file)
    else:
        raise BadImage("not a JPEG or PNG")
    pixels = image.width * image.height
    if pixels > rules.max_pixels:
        raise BadImage("too many pixels")
    if pixels > len(data) * MAX_PIXELS_PER_BYTE.get(image.format, pixels):
        raise BadImage("truncated image")
    return image


def _upright_rgb(image: Image.Image, background: int) -> Image.Image:
    turn = UPRIGHT.get(_orientation(image.info.get("exif", b"")))
    if image.mode == "I":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(behind, image)
    if image.mode != "RGB":  # convert() would copy an RGB image
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The high byte of a 16-bit grey, as Pillow takes it for 16-bit colours; convert("L") would clip to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _orientation(exif: bytes) -> int:
    """The EXIF orientation, or 1. Only this tag is read: parsing all of them can cost as much as a file demands."""
    tiff = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "L", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for i in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHLH", tiff, start + 2 + 12 * i)
            if tag == ORIENTATION:
                return value
    except struct.error:
        pass
    return 1


def _has_no_end(data: bytes) -> bool:
    """Whether the end mark of the file's format is missing."""
    if data.startswith(JPEG):
        return b"\xff\xd9" not in data[-TAIL:]
    if data.startswith(PNG):
        return b"IEND" not in data[-TAIL:]
    return len(data) < 8 + int.from_bytes(data[4:8], "little")
