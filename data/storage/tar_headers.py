"""The headers of a tar: ustar, GNU's long names, PAX.

Python's tarfile takes about ten times as long for a header, which is noticeable beside the decoding of an image.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; for GNU's fields, the tar manual.
"""

import zlib
from typing import BinaryIO, NamedTuple

# Headers and data come in blocks of this size; a block of zeros ends the archive.
BLOCK = 512
END = bytes(BLOCK)
# The data of a larger member is never read: no image is as large, and memory is limited. Beyond the second size, and
# for a longer name, a header is taken for damage.
LARGEST_MEMBER, LARGEST_SKIP, LARGEST_NAME = 1 << 30, 1 << 50, 1 << 20
# Types of header: files with data; entries without data, whatever their size field says; and those that describe the
# next header.
PLAIN, WITHOUT_DATA, SPARSE = b"\x0007", b"123456", b"S"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"xX", b"g"


class DamagedTar(ValueError):
    """A tar cannot be read any further."""


class Member(NamedTuple):
    """A regular file of a tar.

    size: of its data in the tar, in bytes.  fault: why the data cannot be used, or ''; the file can be passed over.
    """

    name: str
    size: int
    fault: str = ""


class _Described(NamedTuple):
    """What headers before a file's own say about it; None where they say nothing."""

    name: str | None = None
    size: int | None = None
    sparse: bool | None = None

    def before(self, later: "_Described") -> "_Described":
        """What both say. Of several headers for one file the first counts, as in tarfile."""
        return _Described(
            later.name if self.name is None else self.name,
            later.size if self.size is None else self.size,
            later.sparse if self.sparse is None else self.sparse,
        )


NOTHING = _Described()


class TarHeaders:
    """Finds the regular files of a tar in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def next(self, skip: int = 0) -> Member | None:
        """The next regular file, with the tar positioned at its data; None at the end.

        skip: bytes of the last file, padding included, that were not read.
        Raises: DamagedTar if the file is cut, has no end mark, or is not a tar.
        """
        described = NOTHING
        while True:
            header = self._after(skip)
            if header == END:
                return None
            kind, name, size = self._fields(header)
            if kind in LONG_NAME + LONG_LINK + PAX + PAX_GLOBAL:
                text = self._text(size)
                found = NOTHING
                if kind != LONG_LINK:
                    found = _Described(_string(text)) if kind == LONG_NAME else _pax(text)
                if kind == PAX_GLOBAL and found != NOTHING:
                    raise DamagedTar("a header for all files names one file's path or size")
                described = described.before(found)
                skip = 0
                continue
            name = name if described.name is None else described.name
            size = size if described.size is None else described.size
            if not 0 <= size <= LARGEST_SKIP:
                raise DamagedTar(f"{name[:200]} has {size} bytes")
            if kind == SPARSE:
                self._skip_sparse_map(header)
            if kind in PLAIN + SPARSE:
                sparse = kind == SPARSE or described.sparse
                large = f"has {size} bytes" if size > LARGEST_MEMBER else ""
                return Member(name, size, "is sparse" if sparse else large)
            skip = 0 if kind in WITHOUT_DATA else padded(size)
            described = NOTHING

    def _skip_sparse_map(self, header: bytes) -> None:
        """Go past the blocks that continue the map of a sparse file; they are not part of its size."""
        more = header[482]
        while more:
            more = self._after(0)[504]

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
            difference = _number(stored) - total
            # Old tars of Sun and HP-UX sum the bytes as signed numbers: each above 127 counts 256 less.
            if difference % 65521 and (difference + 256 * _high_bytes(header[:148] + header[156:])) % 65521:
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


def _pax(text: bytes) -> _Described:
    """What a PAX header's records say, each `LENGTH KEY=VALUE` and a line feed. Raises: DamagedTar."""
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
    sparse = any(key.startswith(b"GNU.sparse") for key in records) or None
    # The name in the header of a sparse file is a made-up one.
    path = records.get(b"GNU.sparse.name", records.get(b"path"))
    return _Described(None if path is None else path.decode("utf-8", "surrogateescape").rstrip("/"), size, sparse)


def _number(field: bytes) -> int:
    """Octal digits, or after a byte of 128 a binary number, after one of 255 a negative one."""
    if field[0] in (128, 255):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 255 else 0)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _high_bytes(data: bytes) -> int:
    return len(data.translate(None, bytes(range(128))))


def _string(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
