"""A picture of a source and its caption: where both lie, whether they changed, and their bytes."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from data.config import ImageRules
from data.images import HEAD, sniff
from data.text.decode import decode_caption

# The problem of a file that is no picture. It is named, but not counted among the pictures.
NO_PICTURE = "not a picture"
# The endings of samples in a shard, by the picture's format.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp"}
# What is wrong with one file. All other errors, such as a failing disk, are the machine's, and end the command.
FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


class Unusable(ValueError):
    """A row cannot become a sample; rows are counted by this error's message."""


@dataclass(slots=True)
class Row:
    """A picture to pack, as its source names it.

    name: its path in the source; '' if the source gives none.
    image: the path of its file, or a function that gives its bytes and may raise Unusable.
    caption: its text; None if it is in caption_file.
    more: a JSON object of what else its source says of it, for KEY.json; '' if that is nothing.
    version: of an image that is no file: another text if its bytes may have changed.
    problem: why it cannot be packed, or ''.
    """

    name: str
    image: str | Callable[[], bytes] = ""
    caption: str | None = None
    caption_file: str = ""
    more: str = ""
    version: str = ""
    problem: str = ""


class Picture(NamedTuple):
    """What becomes a sample: the bytes of a JPEG, PNG or WebP, the member's extension, and the caption."""

    image: bytes
    extension: str
    caption: str


def fingerprint(data: bytes) -> str:
    """A hash of 8 bytes, in hex."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def signature(row: Row) -> str:
    """A short text without spaces that stays as it is while the row's files are not touched; '' if one is missing."""
    try:
        image = file_version(row.image) if isinstance(row.image, str) else row.version
        caption = file_version(row.caption_file) if row.caption is None else _text_hash(row.caption)
    except (OSError, ValueError):  # ValueError: a NUL in a path
        return ""
    return f"{image},{caption}" + (f",{fingerprint(row.more.encode())}" if row.more else "")


def file_version(path: str) -> str:
    """Size and times of a file.

    Raises: OSError; ValueError for a path with a NUL.
    """
    found = os.stat(path)
    # The time of the inode's change too, since copies may bring an older file's time of change with them.
    return f"{found.st_size}.{found.st_mtime_ns}.{found.st_ctime_ns}"


def known_caption_hash(row: Row) -> str:
    """The fingerprint of a row's caption, as it is packed; '' if only a file tells it."""
    return "" if row.caption is None else _text_hash(row.caption)


def read_picture(row: Row, rules: ImageRules) -> Picture:
    """The picture of a row. It is not decoded.

    Raises: Unusable; OSError where the machine fails.
    """
    if row.problem:
        raise Unusable(row.problem)
    if not row.name:
        raise Unusable("no path")
    if not _is_text(row.name):
        raise Unusable("its path is not UTF-8 or holds a NUL")
    if isinstance(row.image, str) and "://" in row.image:
        raise Unusable("a web address (download it first, with img2dataset)")
    caption = _clean(_read_caption_file(row.caption_file)) if row.caption is None else _clean(row.caption)
    if not caption:
        raise Unusable("empty caption")
    image = read_image_file(row.image, rules) if isinstance(row.image, str) else row.image()
    return Picture(image, check_format(image[:HEAD], rules), caption)


def read_image_file(path: str, rules: ImageRules) -> bytes:
    """The bytes of a file that is a picture by its first ones; of others no more than these is read.

    Raises: Unusable; OSError where the machine fails.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise Unusable("not a file")
        with open(path, "rb") as file:
            head = file.read(HEAD)
            check_format(head, rules)
            if found.st_size > rules.max_bytes:
                raise Unusable("too many bytes")
            return head + file.read()
    except OSError as error:
        raise unusable(error) from None


def check_format(head: bytes, rules: ImageRules) -> str:
    """The extension of a picture with these first bytes.

    Raises: Unusable if it is no picture that can be packed.
    """
    form = sniff(head)
    if not head:
        raise Unusable("an empty file")
    if form == "WebP" and not rules.allow_webp:
        raise Unusable("a WebP (allow_webp=true takes it)")
    if form not in EXTENSIONS:
        raise Unusable(f"{'an' if form[0] in 'AEIOU' else 'a'} {form}" if form else "not a JPEG or PNG")
    return EXTENSIONS[form]


def unusable(error: OSError, what: str = "") -> Exception:
    """What to raise for an error of a file: Unusable if it is this file's, else the error itself."""
    if error.errno not in FILE_ERRORS:
        return error
    return Unusable(f"{what}can't be read ({os.strerror(error.errno)})")


def caption_text(data: bytes) -> str:
    """The text of a stored caption.

    Raises: Unusable.
    """
    try:
        return decode_caption(data)
    except ValueError:
        raise Unusable("caption is not UTF-8") from None


def _read_caption_file(path: str) -> str:
    if not path:
        raise Unusable("no .txt beside it")
    try:
        with open(path, "rb") as file:
            return caption_text(file.read())
    except FileNotFoundError:
        raise Unusable("no .txt beside it") from None
    except OSError as error:
        raise unusable(error, "caption ") from None


def _clean(caption: str) -> str:
    """A caption without the blanks and marks at its ends. Raises: Unusable if it is no text."""
    if not _is_text(caption):
        raise Unusable("caption is not UTF-8")  # a NUL: UTF-16 without its mark
    return _strip(caption)


def _strip(caption: str) -> str:
    return caption.strip().strip("\ufeff").strip()


def _is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8 and holds no NUL."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _text_hash(caption: str) -> str:
    return fingerprint(_strip(caption).encode("utf-8", "surrogatepass"))
