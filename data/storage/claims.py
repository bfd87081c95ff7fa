"""Who of many processes makes which file, settled by the file system they share and nothing else."""

import glob
import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path

# A claim that was not renewed for so many seconds is of a process that died. On one machine that is seen at once.
STALE = 600.0


class Claim:
    """PATH.claim, made by one process alone; deleted when the claim ends.

    A process that hangs for longer than STALE loses it, and may wake to find another at the same file. So each holder
    writes to a name of its own, `aside`, and both may end well: they make the same file.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path, self._holder, self._file = path, holder, _file(path)
        self.aside = path.with_name(f"{path.name}.{holder}.part")

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        if self.holds():
            self._file.unlink(missing_ok=True)
        self.aside.unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether it is still this process that has the file."""
        try:
            return self._file.read_text() == self._holder
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Say that the holder lives; to be called every minute or so."""
        with suppress(FileNotFoundError):
            os.utime(self._file)


def claim(path: Path) -> Claim | None:
    """Claim a file, or None if another process is at it; what one that died left behind is cleared away."""
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    file = _file(path)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        if _is_stale(file, holder):
            _clear(path, holder)
        return None
    with os.fdopen(handle, "w") as opened:
        opened.write(holder)
    return Claim(path, holder)


def _file(path: Path) -> Path:
    return path.with_name(path.name + ".claim")


def _is_stale(file: Path, holder: str) -> bool:
    with suppress(FileNotFoundError):
        host, _, rest = file.read_text().rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and rest.isdigit() and not _lives(int(rest)):
            return True
    # The clock of the storage counts, not this machine's.
    probe = file.with_name(f"{file.name}.{holder}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime > STALE
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _clear(path: Path, holder: str) -> None:
    """Take a stale claim away; of several that try, the rename lets one succeed."""
    away = path.with_name(f"{path.name}.{holder}.stale")
    try:
        os.rename(_file(path), away)
    except FileNotFoundError:
        return
    away.unlink(missing_ok=True)
    for part in path.parent.glob(glob.escape(path.name) + ".*.part"):
        part.unlink(missing_ok=True)
