"""Local files of which only a bounded number is open at a time; one that was closed meanwhile is read on unnoticed."""

import errno
import io
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from data.storage.clients import UnreadableError
from data.storage.machine import free_handles, raise_if_machine
from data.storage.retries import MAX_TRIES, wait

logger = logging.getLogger(__name__)

# Files that a process holds open: of the handles that are free at its start a half, within these bounds. An image shard
# and its sidecar are read side by side.
FEWEST_OPEN, MOST_OPEN = 2, 4096
# The machine is out of something that closing idle files may give back.
SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What a disk on the network, or a failing one, raises for a while.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ENOLINK,
    errno.ESHUTDOWN, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ECOMM, errno.EPROTO,
}  # fmt: skip


class _Handle:
    """An open file. It is closed when nobody refers to it, so no thread can lose it in the middle of a read."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.number)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.size, self.version = found.st_size, found.st_mtime_ns

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenFiles:
    """The handles of a process, at most `limit` of them: the file that was not read for longest is closed first.

    There is no lock, since a process may be forked while a thread holds it: each operation on the dictionary is atomic.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._handles: OrderedDict[int, _Handle] = OrderedDict()

    @property
    def limit(self) -> int:
        """The most handles; by default from the limit of open files and what is open at the first use."""
        if self._limit is None:
            self._limit = min(max(free_handles() // 2, FEWEST_OPEN), MOST_OPEN)
        return self._limit

    def __len__(self) -> int:
        return len(self._handles)

    def get(self, file: "PooledFile") -> _Handle:
        """The handle of a file, which is opened if it is closed.

        Raises: OSError, as open does; UnreadableError if it is no longer the file that it was.
        """
        key = id(file)
        try:
            self._handles.move_to_end(key)
            return self._handles[key]
        except KeyError:
            pass
        while len(self._handles) >= self.limit:
            self._handles.popitem(last=False)
        handle = _Handle(file.path)
        file.check(handle)
        self._handles[key] = handle
        return handle

    def drop(self, file: "PooledFile") -> None:
        """Close a file."""
        self._handles.pop(id(file), None)

    def shrink(self) -> None:
        """Close all files, and hold at most half as many from here on: the machine is out of handles."""
        self._limit = max(len(self._handles) // 2, FEWEST_OPEN)
        self._handles.clear()


open_files = OpenFiles()


def check_handles(what: str) -> None:
    """Check that one more file or connection can be opened, with the idle files closed if need be.

    what: the URL that could not be read, for the message.
    Raises: MachineError.
    """
    for tries in range(2):
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
            return
        except OSError as error:
            open_files.shrink()
            if tries:
                raise_if_machine(error, what)


def _after_fork() -> None:
    """A forked process counts its own handles. Those of its parent are closed in it."""
    global open_files
    open_files = OpenFiles()


os.register_at_fork(after_in_child=_after_fork)


class PooledFile:
    """A local file that is read at any offset, by any thread. It takes a handle only while it is read.

    Errors of the machine end a run (MachineError, after one more try with all idle files closed); errors that may pass
    are tried again for a minute, with the file opened again, and then the file counts as unreadable.
    Raises: OSError, as open does; MachineError; UnreadableError, also if the file changed while it was closed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._first: tuple[int, int] | None = None  # size and time of change
        self._fault = ""
        try:
            self.size = open_files.get(self).size
        except OSError as error:
            self.size = self._try_again(error, lambda: open_files.get(self).size)

    def read_at(self, offset: int, *buffers: Any) -> int:
        """Fill these buffers one after the other. Returns the number of bytes, less than asked for at the end."""
        try:
            return self._read(offset, buffers)
        except OSError as error:
            return self._try_again(error, self._read, offset, buffers)

    def _read(self, offset: int, buffers: tuple[Any, ...]) -> int:
        if self._fault:  # a file that failed for good costs a minute once, not for each of its samples
            raise UnreadableError(self._fault)
        handle = open_files.get(self)  # referred to during the read, so that no other thread closes it
        return os.preadv(handle.number, buffers, offset)

    def check(self, handle: _Handle) -> None:
        """Raises: UnreadableError if the file was replaced or written to while it was closed."""
        found = handle.size, handle.version
        if self._first is None:
            self._first = found
        elif self._first != found:
            raise UnreadableError(f"{self.path} changed while it was read: {self._first} before, {found} now")

    def _try_again(self, error: OSError, action: Callable[..., int], *arguments: Any) -> int:
        """What the action returns, which failed with this error, after as many tries as its errors are worth."""
        failures, freed = 0, False
        while True:
            open_files.drop(self)
            if error.errno in SCARCE and not freed:
                freed = True
                open_files.shrink()
            else:
                raise_if_machine(error, self.path)
                if error.errno not in PASSING:
                    raise error
                failures += 1
                self._wait(failures, os.strerror(error.errno))
            try:
                return action(*arguments)
            except OSError as again:
                error = again

    def _wait(self, failures: int, reason: str) -> None:
        """Wait before the next try. Raises: UnreadableError after the last one."""
        if failures == MAX_TRIES:
            self._fault = f"{self.path}: {MAX_TRIES} tries in a row failed ({reason})"
            raise UnreadableError(self._fault)
        if failures == 1:
            logger.warning("%s: %s; trying again for up to a minute", self.path, reason)
        wait(failures)

    def __del__(self) -> None:
        open_files.drop(self)


class PooledReader(io.RawIOBase):
    """A PooledFile as a stream. The position is kept here, so that a closed file is read on where it was."""

    def __init__(self, file: PooledFile) -> None:
        super().__init__()
        self.file, self.name, self._position = file, file.path, 0

    def close(self) -> None:
        """Close the file. Whoever still refers to the PooledFile may read it; it is opened again for that."""
        if not self.closed:
            open_files.drop(self.file)
        super().close()

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
        """Set the position."""
        self._position = offset + (0, self._position, self.file.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer or a part of it. Returns the number of bytes, 0 at the end of the file."""
        count = self.file.read_at(self._position, buffer)
        self._position += count
        return count
