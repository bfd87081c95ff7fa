"""Claims on files, so that many processes divide work among them by their shared file system alone."""

import glob
import os
import re
import socket
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

# Seconds without renewal after which a claim is taken for that of a dead process. On the same machine a dead process
# is recognised at once, by its id.
STALE_AFTER = 600.0


class Claim:
    """A process's claim on a file: PATH.claim, which only one process can create. It is deleted when the claim ends.

    A process that hangs for longer than STALE_AFTER loses its claim, and may resume while another process makes the
    same file. Each holder therefore writes to its own file `aside`. Both may finish: they make the same content.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path, self._holder, self._file = path, holder, _claim_file(path)
        self.aside = path.with_name(f"{path.name}.{holder}.part")

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_held():
            self._file.unlink(missing_ok=True)
        self.aside.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether this process still holds the claim."""
        try:
            return self._file.read_text() == self._holder
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Show that the holder is alive; to be called every minute or so."""
        with suppress(FileNotFoundError):
            os.utime(self._file)


def claim(path: Path) -> Claim | None:
    """Claim a file; None if another process holds it. The leftovers of a dead holder are removed, for the next call."""
    holder, file = new_holder(), _claim_file(path)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        if _is_stale(file, holder):
            _remove_stale(path, holder)
        return None
    with os.fdopen(handle, "w") as opened:
        opened.write(holder)
    return Claim(path, holder)


def new_holder() -> str:
    """A name for this process as the holder of one claim, which no other has."""
    return f"{_processes()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def is_dead(holder: str) -> bool:
    """Whether a holder was a process of this machine that is there no more."""
    pid = re.fullmatch(re.escape(_processes()) + r"-([0-9]{1,9})-[0-9a-f]{8}", holder)
    return pid is not None and not _is_alive(int(pid[1]))


@cache
def _processes() -> str:
    """Where the id of a process means the same process: the host, its present boot, and the container.

    The name of the host does not tell, since containers on several machines often have one name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{socket.gethostname()}-{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _claim_file(path: Path) -> Path:
    return path.with_name(path.name + ".claim")


def _is_stale(file: Path, holder: str) -> bool:
    with suppress(FileNotFoundError):
        if is_dead(file.read_text()):
            return True
    # Ages are measured by the clock of the storage, which may differ from this machine's.
    probe = file.with_name(f"{file.name}.{holder}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime > STALE_AFTER
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove_stale(path: Path, holder: str) -> None:
    """Remove a stale claim and what its holder wrote. If several processes try, the rename lets one succeed."""
    away = path.with_name(f"{path.name}.{holder}.stale")
    try:
        os.rename(_claim_file(path), away)
    except FileNotFoundError:
        return
    away.unlink(missing_ok=True)
    for part in path.parent.glob(glob.escape(path.name) + ".*.part"):
        part.unlink(missing_ok=True)
