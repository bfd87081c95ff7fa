"""The bytes of a caption as text: the one place that knows how captions are encoded."""

import codecs

NOT_UTF8 = "caption not UTF-8"
# By the mark that begins the text. That of UTF-32 begins as one of UTF-16 does, so it comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_caption(data: bytes) -> str:
    """The text of a caption: UTF-8, or what a byte order mark says. The mark is not part of the text.

    Raises: ValueError (NOT_UTF8) for any other encoding, UTF-16 without a mark included.
    """
    mark, codec = next(((mark, codec) for mark, codec in MARKS if data.startswith(mark)), (b"", "utf-8"))
    text = data[len(mark) :]
    # ASCII in UTF-16 is UTF-8 too, with a NUL for every letter.
    if codec == "utf-8" and 3 * text.count(0) > len(text):
        raise ValueError(NOT_UTF8)
    try:
        return text.decode(codec)
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None


def is_text(data: bytes) -> bool:
    """Whether decode_caption reads a caption."""
    try:
        decode_caption(data)
    except ValueError:
        return False
    return True
