"""Where data lies, a path, http(s):// or s3://, and reading from there: retried, and gone on with where it broke."""

import io
import logging
import os
import random
import re
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data.storage.clients import Passing, Unreadable, http_part, list_s3, s3_part, write_s3

logger = logging.getLogger(__name__)

# So many tries in a row that bring nothing, with waits between them that double, in seconds: a minute in all.
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 30.0
# A read asks for so many bytes; for more and more as long as it goes straight on, since a request has a price.
FIRST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 23


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a path.

    Raises: ValueError if it is a URL of a kind that isn't read.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    if scheme and scheme[1] not in ("http", "https", "s3"):
        raise ValueError(f"'{location}': {scheme[1]}:// is not read; use a path, http(s):// or s3://")
    return scheme is not None


def join(folder: str | Path, name: str) -> str:
    """The location of a name in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(str(folder)) else os.path.join(folder, name)


def split(location: str) -> tuple[str, str]:
    """The folder and the name of a location; a URL's question is no part of the name."""
    folder, _, name = location.rpartition("/")
    return folder or ("/" if location.startswith("/") else "."), name.partition("?")[0] if is_remote(location) else name


def open_location(location: str) -> BinaryIO:
    """A file for reading, seekable.

    Raises: OSError, of which FileNotFoundError if it isn't there and Unreadable once no try helps any more.
    """
    return io.BufferedReader(RemoteFile(location)) if is_remote(location) else open(location, "rb")


def read_bytes(location: str) -> bytes:
    """A whole file.

    Raises: OSError, as open_location.
    """
    with open_location(location) as file:
        return file.read()


def size_of(file: BinaryIO) -> int:
    """The bytes of an open file; it is set back to its begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def list_names(folder: str) -> list[str]:
    """The names in a folder.

    Raises: OSError if it isn't there; ValueError if it is one that can't be listed.
    """
    if not is_remote(folder):
        return os.listdir(folder)
    if folder.startswith("s3://"):
        return list_s3(folder)
    raise ValueError(
        f"'{folder}' cannot be listed over HTTP: name the shards, as in {join(folder, '{00000..00099}.tar')}"
    )


def write_whole(location: str, data: bytes) -> None:
    """Write a file so that it is never seen half: aside and renamed, or as one object.

    Raises: OSError; ValueError for http(s)://.
    """
    if location.startswith("s3://"):
        write_s3(location, data)
    elif is_remote(location):
        raise ValueError(f"'{location}' cannot be written over HTTP: name a path or s3://")
    else:
        aside = Path(location + ".part")
        aside.write_bytes(data)
        os.replace(aside, location)


class RemoteFile(io.RawIOBase):
    """A file read by ranges, at most three blocks of it in memory; reads straight on, it fetches a block ahead.

    Raises: OSError, as open_location, from the beginning on; Unreadable also if the file changes meanwhile.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._part = partial(s3_part if location.startswith("s3://") else http_part, location)
        self._file: tuple[int, str] | None = None  # size and version
        self._position = self._start = 0
        self._length = FIRST_BLOCK
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._block = self._fetch(0, FIRST_BLOCK)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, without a request."""
        assert self._file
        self._position = offset + (0, self._position, self._file[0])[whence]
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def] # a writable buffer has no name before 3.12
        """Fill the buffer or a part of it; 0 at the end of the file."""
        assert self._file
        if self._position >= self._file[0]:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            self._move()
        begin = self._position - self._start
        some = memoryview(self._block)[begin : begin + len(buffer)]
        buffer[: len(some)] = some
        self._position += len(some)
        return len(some)

    def _move(self) -> None:
        """Fetch the block of the position."""
        assert self._file
        onwards = self._position - (self._start + len(self._block))
        straight = 0 <= onwards < self._length
        self._length = min(2 * self._length, LARGEST_BLOCK) if straight else FIRST_BLOCK
        ahead, self._ahead = self._ahead, None
        if straight and ahead:
            self._start, self._block = ahead[0], ahead[1].result()
        if not self._start <= self._position < self._start + len(self._block):
            self._start, self._block = self._position, self._fetch(self._position, self._position + self._length)
        end = self._start + len(self._block)
        if straight and end < self._file[0]:
            future: Future[bytes] = Future()
            threading.Thread(target=self._fetch_into, args=(future, end, end + self._length), daemon=True).start()
            self._ahead = end, future

    def _fetch_into(self, future: "Future[bytes]", start: int, end: int) -> None:
        try:
            future.set_result(self._fetch(start, end))
        except BaseException as error:
            future.set_exception(error)

    def _fetch(self, start: int, end: int) -> bytes:
        got, failures, problem = bytearray(), 0, ""
        while failures < TRIES:
            if failures:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1))
            before = len(got)
            try:
                with self._part(start + before, end) as part:
                    self._check_same(part.size, part.version)
                    end = min(end, part.size)
                    for chunk in part.chunks:
                        got += chunk
                        if len(got) > end - start:  # a server that knows no ranges sends more
                            break
            except Passing as error:
                problem = str(error)
            else:
                problem = "the answer was cut short"
            if len(got) >= end - start and self._file:
                return bytes(got[: end - start])
            logger.info("%s: %s at byte %d, trying on", self._location, problem, start + len(got))
            failures = failures + 1 if len(got) == before else 1
        raise Unreadable(
            f"{self._location}: {TRIES} tries in a row brought nothing from byte {start + len(got)} on ({problem})"
        )

    def _check_same(self, size: int, version: str) -> None:
        if self._file is None:
            self._file = size, version
        elif self._file != (size, version):
            raise Unreadable(f"{self._location} changed while it was read: {self._file} before, {(size, version)} now")
