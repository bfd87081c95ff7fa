"""Files at a location: a path, http(s)://, s3://, gs:// or az://. Remote reads are retried and resumed."""

import errno
import io
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data.storage.atomic import CouldNotWrite, atomic_file
from data.storage.azure import azure_range, list_azure, write_azure
from data.storage.clients import (
    RangeResponse,
    TransientError,
    UnreadableError,
    http_range,
    list_s3,
    s3_range,
    write_s3,
)
from data.storage.google import google_range, list_google, write_google
from data.storage.local_files import SCARCE, PooledFile, PooledReader, check_handles
from data.storage.retries import MAX_TRIES, wait
from data.storage.s3_objects import facts, upload

logger = logging.getLogger(__name__)

# Bytes of a request: the block size doubles while a file is read sequentially, since each request has a cost.
FIRST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 23
# Blocks that a process fetches in the background at the same time, each over a connection of its own.
MAX_PREFETCHES = 32
# What is known of each kind of remote storage, by its scheme.
RANGES: dict[str, Callable[[str, int, int], AbstractContextManager[RangeResponse]]] = {
    "http": http_range, "https": http_range, "s3": s3_range, "gs": google_range, "az": azure_range,
}  # fmt: skip
LISTS: dict[str, Callable[[str], list[str]]] = {"s3": list_s3, "gs": list_google, "az": list_azure}
WRITES: dict[str, Callable[[str, bytes], None]] = {"s3": write_s3, "gs": write_google, "az": write_azure}
_prefetches = threading.BoundedSemaphore(MAX_PREFETCHES)


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a path.

    Raises: ValueError for a URL of a scheme that is not supported.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    if scheme and scheme[1] not in RANGES:
        raise ValueError(f"'{location}': {scheme[1]}:// is not read; use a path, http(s)://, s3://, gs:// or az://")
    return scheme is not None


def can_be_listed(location: str) -> bool:
    """Whether the names in a folder can be asked for: not over HTTP."""
    return not is_remote(location) or location.partition("://")[0] in LISTS


def absolute(location: str | Path) -> str:
    """A location as an error names it: a path in full, so that a reader sees where it was looked for."""
    return str(location) if is_remote(str(location)) else os.path.abspath(location)


def join(folder: str | Path, name: str) -> str:
    """The location of a name in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(str(folder)) else os.path.join(folder, name)


def split(location: str) -> tuple[str, str]:
    """The folder and the name of a location. The query of an http URL is not part of the name."""
    folder, _, name = location.rpartition("/")
    has_query = location.startswith(("http://", "https://"))
    return folder or ("/" if location.startswith("/") else "."), name.partition("?")[0] if has_query else name


def open_location(location: str) -> BinaryIO:
    """A seekable file for reading. Its `name` is the location.

    Raises: OSError; of these FileNotFoundError if there is no such file, UnreadableError once all tries have failed,
    MachineError if this machine is out of open files, memory or space.
    """
    return io.BufferedReader(RemoteFile(location) if is_remote(location) else PooledReader(PooledFile(location)))


def read_bytes(location: str) -> bytes:
    """A whole file.

    Raises: OSError, as open_location.
    """
    with open_location(location) as file:
        return file.read()


def size_of(file: BinaryIO) -> int:
    """The size of an open file in bytes. The position is set back to the beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def list_names(folder: str) -> list[str]:
    """The names in a folder.

    Raises: OSError if there is no such folder; ValueError for http(s)://, which cannot be listed.
    """
    if not is_remote(folder):
        return os.listdir(folder)
    if can_be_listed(folder):
        return LISTS[folder.partition("://")[0]](folder)
    raise ValueError(
        f"'{folder}' cannot be listed over HTTP: name the shards, as in {join(folder, '{00000..00099}.tar')}"
    )


def exists(location: str) -> bool:
    """Whether there is such a path, or such an object of S3.

    Raises: OSError.
    """
    if not location.startswith("s3://"):
        return os.path.exists(location)
    try:
        return file_size(location) >= 0
    except FileNotFoundError:
        return False


def file_size(location: str) -> int:
    """The bytes of a file at a path or on S3, without opening it.

    Raises: OSError.
    """
    return facts(location).size if location.startswith("s3://") else os.path.getsize(location)


@contextmanager
def whole_file(location: str, aside: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to. After the block the file appears at the location whole, after an error not at all.

    aside: the path to write to; as atomic_file has it for a path, else in TMPDIR.
    Raises: as write_whole.
    """
    if not is_remote(location):
        with atomic_file(location, aside) as part:
            yield part
        return
    check_writable(location)
    with tempfile.TemporaryDirectory() as folder:
        part = aside or Path(folder) / "part"
        try:
            yield part
            upload(part, location)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CouldNotWrite(part, error.strerror) from None
            raise
        finally:
            part.unlink(missing_ok=True)


def check_writable(location: str) -> None:
    """Raises: ValueError for what large files cannot be written to: all but a path and s3://."""
    if is_remote(location) and not location.startswith("s3://"):
        how = "" if can_be_listed(location) else " over HTTP"
        raise ValueError(f"'{location}' cannot be written{how}: name a path or s3://")


def make_folder(location: str) -> None:
    """Make a folder that may be there. S3 has none, and needs none.

    Raises: as write_whole.
    """
    check_writable(location)
    if not is_remote(location):
        os.makedirs(location, exist_ok=True)


def write_whole(location: str, data: bytes) -> None:
    """Write a small file that appears whole or not at all: a path through atomic_file, else as one object.

    Raises: OSError; ValueError for http(s)://, which cannot be written.
    """
    if is_remote(location):
        scheme = location.partition("://")[0]
        if scheme not in WRITES:
            check_writable(location)
        WRITES[scheme](location, data)
    else:
        with atomic_file(location) as aside:
            aside.write_bytes(data)


class RemoteFile(io.RawIOBase):
    """A remote file, read by ranges. At most three blocks are in memory; sequential reads prefetch the next block.

    Raises: OSError, as open_location, from the constructor on; UnreadableError also if the file changes meanwhile.
    """

    def __init__(self, location: str) -> None:
        self._location = self.name = location
        self._request_range = partial(RANGES[location.partition("://")[0]], location)
        self._file: tuple[int, str] | None = None  # size and version
        self._position = self._start = 0
        self._block_size = FIRST_BLOCK
        self._next_block: tuple[int, Future[bytes]] | None = None  # its start and, once fetched, its bytes
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
        """Set the position, without a request."""
        assert self._file
        self._position = offset + (0, self._position, self._file[0])[whence]
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def] # a writable buffer has no type before 3.12
        """Fill the buffer or a part of it. Returns the number of bytes, 0 at the end of the file."""
        assert self._file
        if self._position >= self._file[0]:
            return 0
        if not self._in_block():
            self._load_block()
        begin = self._position - self._start
        data = memoryview(self._block)[begin : begin + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _in_block(self) -> bool:
        return self._start <= self._position < self._start + len(self._block)

    def _load_block(self) -> None:
        """Make the block that holds the position the current one, and prefetch the next if reads are sequential."""
        assert self._file
        sequential = 0 <= self._position - (self._start + len(self._block)) < self._block_size
        self._block_size = min(2 * self._block_size, LARGEST_BLOCK) if sequential else FIRST_BLOCK
        prefetched, self._next_block = self._next_block, None
        if sequential and prefetched:
            self._start, self._block = prefetched[0], prefetched[1].result()
        if not self._in_block():
            block = self._fetch(self._position, self._position + self._block_size)
            self._start, self._block = self._position, block
        end = self._start + len(self._block)
        if sequential and end < self._file[0]:
            self._prefetch(end, end + self._block_size)

    def _prefetch(self, start: int, end: int) -> None:
        """Fetch the bytes [start, end) in the background, if few others are fetched at the moment."""
        room = _prefetches
        if not room.acquire(blocking=False):
            return
        future: Future[bytes] = Future()
        try:
            threading.Thread(target=self._fetch_into, args=(future, start, end, room), daemon=True).start()
            self._next_block = start, future
        except RuntimeError:  # no memory for a thread; the block is fetched when it is needed
            room.release()

    def _fetch_into(self, future: "Future[bytes]", start: int, end: int, room: threading.Semaphore) -> None:
        try:
            future.set_result(self._fetch(start, end))
        except BaseException as error:
            future.set_exception(error)
        finally:
            room.release()

    def _fetch(self, start: int, end: int) -> bytes:
        """The bytes [start, end). A failed request is resumed from the last byte that came."""
        received, failures, problem = bytearray(), 0, ""
        while failures < MAX_TRIES:
            if failures:
                wait(failures)
            before = len(received)
            try:
                with self._request_range(start + before, end) as response:
                    self._check_unchanged(response.size, response.version)
                    end = min(end, response.size)
                    for chunk in response.chunks:
                        received += chunk
                        if len(received) > end - start:  # a server without ranges sends more
                            break
            except TransientError as error:
                check_handles(self._location)  # too few open files look like a server that refuses
                problem = str(error)
            except OSError as error:
                if error.errno not in SCARCE:
                    raise
                check_handles(self._location)
                problem = str(error)
            else:
                problem = "the answer was cut short"
            if len(received) >= end - start and self._file:
                return bytes(received[: end - start])
            logger.info("%s: %s at byte %d, trying on", self._location, problem, start + len(received))
            failures = failures + 1 if len(received) == before else 1
        raise UnreadableError(
            f"{self._location}: {MAX_TRIES} tries in a row brought nothing from byte {start + len(received)} on "
            f"({problem})"
        )

    def _check_unchanged(self, size: int, version: str) -> None:
        if self._file is None:
            self._file = size, version
        elif self._file != (size, version):
            raise UnreadableError(
                f"{self._location} changed while it was read: {self._file} before, {(size, version)} now"
            )


def _reset_prefetches() -> None:
    global _prefetches
    _prefetches = threading.BoundedSemaphore(MAX_PREFETCHES)


os.register_at_fork(after_in_child=_reset_prefetches)  # threads of the parent do not run in it and release nothing
