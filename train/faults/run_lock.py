"""One training at a time in a run_dir: two would write over each other's checkpoints and metrics."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

# Longer than an NFS server keeps the locks of a node that died (its lease, 90 s).
WAIT = 120.0


class InUse(RuntimeError):
    """Another training is at the run_dir."""


def lock_run_dir(run_dir: Path, wait: float = WAIT) -> None:
    """Hold RUN_DIR/lock until this process ends, however it ends; the first rank's alone.

    A POSIX record lock: the kernel, or the file server, takes it back, and loader workers don't inherit it. Where the
    file system has no locks there is none.
    Raises: InUse if another training has it and keeps it for `wait` seconds; OSError if run_dir can't be written to.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            holder = os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "unknown"
        except OSError:  # this file system has no locks
            return
        if time.monotonic() > deadline:
            raise InUse(
                f"another training is at run_dir={run_dir} ({holder}): wait for its end, stop it, or choose another "
                "run_dir"
            )
        if not told:
            print(f"waiting up to {wait:.0f} s for {holder} to leave run_dir={run_dir}", file=sys.stderr, flush=True)
            told = True
        time.sleep(min(1.0, wait / 10))
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    # And left open: with the file the lock would go.
