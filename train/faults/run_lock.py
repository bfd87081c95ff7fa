"""One training at a time in a run_dir: two would overwrite each other's checkpoints and metrics."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

# Seconds; longer than an NFS server keeps the locks of a node that died (its lease, 90 s).
WAIT = 120.0


class InUse(RuntimeError):
    """Another training uses the run_dir."""


def lock_run_dir(run_dir: Path, wait: float = WAIT) -> None:
    """Lock RUN_DIR/lock until this process ends, however it ends; only rank 0 calls it.

    It is a POSIX record lock: the kernel or the file server releases it, and loader workers do not inherit it. On a
    file system without locks nothing is locked.
    Raises: InUse if another training still has the lock after `wait` seconds; OSError if run_dir is not writable.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline, announced = time.monotonic() + wait, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            owner = os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "unknown process"
        except OSError:  # this file system has no locks
            return
        if time.monotonic() > deadline:
            raise InUse(
                f"another training uses run_dir={run_dir} ({owner}): wait for its end, stop it, or choose another "
                "run_dir"
            )
        if not announced:
            print(f"waiting up to {wait:.0f} s for {owner} to release run_dir={run_dir}", file=sys.stderr, flush=True)
            announced = True
        time.sleep(min(1.0, wait / 10))
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    # The file stays open: closing it would release the lock.
