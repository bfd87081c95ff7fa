"""The headers of a tar: ustar, GNU's long names, PAX.

Python's tarfile needs about ten times as long for a header, which shows beside the decoding of an image.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; for GNU's fields, the tar manual.
"""

import zlib
from typing import BinaryIO

# Headers and data come in blocks; an empty one ends the archive.
BLOCK = 512
END = bytes(BLOCK)
# What is larger is taken for damage: no image has such a size, and memory has a limit.
LARGEST_MEMBER, LARGEST_NAME = 1 << 30, 1 << 20
# Types of header: files with data, what has none whatever its size field says, and those that tell of the next header.
PLAIN, WITHOUT_DATA, SPARSE = b"\x0007", b"123456", b"S"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"xX", b"g"


class Damaged(ValueError):
    """A tar cannot be read any further."""


class TarHeaders:
    """Finds the regular files of a tar one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def next(self, skip: int = 0) -> tuple[str, int] | None:
        """Name and size of the next regular file, with the tar standing at its data; None at the end.

        skip: bytes of the last file, padding included, that were not read.
        Raises: Damaged if the tar is cut, has no end mark, or is none.
        """
        long_name: str | None = None
        pax_size: int | None = None
        while True:
            header = self._after(skip)
            if header == END:
                return None
            kind, name, size = self._fields(header)
            if kind in LONG_NAME + LONG_LINK + PAX + PAX_GLOBAL:
                text = self._text(size)
                found = (
                    (_string(text), None) if kind == LONG_NAME else _pax(text) if kind != LONG_LINK else (None, None)
                )
                if kind == PAX_GLOBAL and found != (None, None):
                    raise Damaged("a header for all files names one file's path or size")
                # Of several headers for one file the first holds, as in tarfile.
                long_name = found[0] if long_name is None else long_name
                pax_size = found[1] if pax_size is None else pax_size
                skip = 0
                continue
            name, size = name if long_name is None else long_name, size if pax_size is None else pax_size
            if not 0 <= size <= LARGEST_MEMBER or kind == SPARSE:
                raise Damaged(f"{name[:200]} has {size} bytes or is sparse")
            if kind in PLAIN:
                return name, size
            skip = 0 if kind in WITHOUT_DATA else padded(size)
            long_name = pax_size = None

    def _after(self, skip: int) -> bytes:
        """The block that comes after so many bytes; short ways are read, which is quicker than to seek."""
        if skip > 8 * BLOCK:
            self._file.seek(skip, 1)
            skip = 0
        block = self._file.read(skip + BLOCK)[skip:]
        if len(block) < BLOCK:
            raise Damaged("it ends without an end mark: it was cut")
        return block

    def _fields(self, header: bytes) -> tuple[bytes, str, int]:
        """Type, name and size of a header whose checksum is right."""
        stored = header[148:156]
        # The sum of all bytes, with spaces for the checksum itself. Adler-32 has it in its lower half, plus one and
        # modulo 65521, at the speed of C.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(stored) + 8 * ord(" ")
        try:
            if (_number(stored) - total) % 65521:
                raise Damaged("the checksum of a header is wrong")
            size = _number(header[124:136])
        except Damaged:
            raise
        except ValueError:
            raise Damaged("there is no header where one should be") from None
        kind, name = header[156:157], _string(header[:100])
        if header[345] and kind not in LONG_NAME + LONG_LINK + SPARSE:
            name = f"{_string(header[345:500])}/{name}"
        return kind, name, size

    def _text(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_NAME:
            raise Damaged(f"a header for long names has {size} bytes")
        text = self._file.read(padded(size))
        if len(text) < padded(size):
            raise Damaged("it ends within a header")
        return text[:size]


def padded(size: int) -> int:
    """The bytes that a file takes in a tar."""
    return size + -size % BLOCK


def _pax(text: bytes) -> tuple[str | None, int | None]:
    """path and size among a PAX header's records, each `LENGTH KEY=VALUE` and a line feed."""
    records: dict[bytes, bytes] = {}
    at = 0
    try:
        while at < len(text):
            space = text.index(b" ", at)
            end = at + int(text[at:space])
            key, equals, value = text[space + 1 : end - 1].partition(b"=")
            if not key or not equals or text[end - 1 : end] != b"\n":
                raise ValueError
            records[key], at = value, end
        size = int(records[b"size"]) if b"size" in records else None
    except ValueError:
        raise Damaged("a PAX header cannot be read") from None
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise Damaged("a file is sparse")
    path = records.get(b"path")
    return None if path is None else path.decode("utf-8", "surrogateescape").rstrip("/"), size


def _number(field: bytes) -> int:
    """Octal digits, or a binary number behind a byte of 128."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _string(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
