"""The headers of a tar: ustar, GNU's long names, PAX.

Python's tarfile takes about ten times as long for a header, which is noticeable beside the decoding of an image.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; for GNU's fields, the tar manual.
"""

import zlib
from typing import BinaryIO

# Headers and data come in blocks of this size; a block of zeros ends the archive.
BLOCK = 512
END = bytes(BLOCK)
# A larger size in a header is taken for damage: no image is as large, and memory is limited.
LARGEST_MEMBER, LARGEST_NAME = 1 << 30, 1 << 20
# Types of header: files with data; entries without data, whatever their size field says; and those that describe the
# next header.
PLAIN, WITHOUT_DATA, SPARSE = b"\x0007", b"123456", b"S"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"xX", b"g"


class DamagedTar(ValueError):
    """A tar cannot be read any further."""


class TarHeaders:
    """Finds the regular files of a tar in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def next(self, skip: int = 0) -> tuple[str, int] | None:
        """Name and size of the next regular file, with the file positioned at its data; None at the end.

        skip: bytes of the last file, padding included, that were not read.
        Raises: DamagedTar if the file is cut, has no end mark, or is not a tar.
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
                    raise DamagedTar("a header for all files names one file's path or size")
                # Of several headers for one file the first counts, as in tarfile.
                long_name = found[0] if long_name is None else long_name
                pax_size = found[1] if pax_size is None else pax_size
                skip = 0
                continue
            name, size = name if long_name is None else long_name, size if pax_size is None else pax_size
            if not 0 <= size <= LARGEST_MEMBER or kind == SPARSE:
                raise DamagedTar(f"{name[:200]} has {size} bytes or is sparse")
            if kind in PLAIN:
                return name, size
            skip = 0 if kind in WITHOUT_DATA else padded(size)
            long_name = pax_size = None

    def _after(self, skip: int) -> bytes:
        """The block after `skip` bytes. Few bytes are read over, which is faster than a seek."""
        if skip > 8 * BLOCK:
            self._file.seek(skip, 1)
            skip = 0
        block = self._file.read(skip + BLOCK)[skip:]
        if len(block) < BLOCK:
            raise DamagedTar("it ends without an end mark: it was cut")
        return block

    def _fields(self, header: bytes) -> tuple[bytes, str, int]:
        """Type, name and size of a header whose checksum is right."""
        stored = header[148:156]
        # The sum of all bytes, with spaces in place of the checksum itself. The lower half of Adler-32 is that sum plus
        # one, modulo 65521, at the speed of C.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(stored) + 8 * ord(" ")
        try:
            if (_number(stored) - total) % 65521:
                raise DamagedTar("the checksum of a header is wrong")
            size = _number(header[124:136])
        except DamagedTar:
            raise
        except ValueError:
            raise DamagedTar("there is no header where one should be") from None
        kind, name = header[156:157], _string(header[:100])
        if header[345] and kind not in LONG_NAME + LONG_LINK + SPARSE:
            name = f"{_string(header[345:500])}/{name}"
        return kind, name, size

    def _text(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_NAME:
            raise DamagedTar(f"a header for long names has {size} bytes")
        text = self._file.read(padded(size))
        if len(text) < padded(size):
            raise DamagedTar("it ends within a header")
        return text[:size]


def padded(size: int) -> int:
    """The bytes that the data of a file takes in a tar."""
    return size + -size % BLOCK


def _pax(text: bytes) -> tuple[str | None, int | None]:
    """path and size from a PAX header's records, each `LENGTH KEY=VALUE` and a line feed. Raises: DamagedTar."""
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
        raise DamagedTar("a PAX header cannot be read") from None
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise DamagedTar("a file is sparse")
    path = records.get(b"path")
    return None if path is None else path.decode("utf-8", "surrogateescape").rstrip("/"), size


def _number(field: bytes) -> int:
    """Octal digits, or after a byte of 128 a binary number."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _string(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
