"""Faults of the machine: too few open files, no memory, no space. They end a run; no file and no sample is to blame."""

import errno
import os
import resource

# The soft limit of open files is raised no higher, since some programs that a run starts go through all numbers.
HIGHEST_LIMIT = 1 << 20
MORE_FILES = "run `ulimit -n 65536` before it (or raise LimitNOFILE of the service, nofile in limits.conf)"
# What to do for the errors that a storage raises when the machine is out of something.
REMEDIES = {
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: "the whole machine has too many files open: close other programs, or raise fs.file-max with sysctl",
    errno.ENOMEM: "give the job more memory, or lower data.workers or data.shuffle_block",
    errno.ENOBUFS: "the kernel has no memory for connections: close other programs, or lower data.workers",
    errno.ENOSPC: "make space on the disk that caches these files",
    errno.EDQUOT: "make space within your quota on the disk that caches these files",
}


class MachineError(OSError):
    """The machine is out of open files, memory or space. It ends a run whatever data.unreadable_shard is."""


def raise_if_machine(error: OSError, what: str) -> None:
    """Raises: MachineError if the error's number says that the machine is out of something.

    what: the file or URL that was being read, for the message.
    """
    if isinstance(error, MachineError):
        raise error
    if error.errno in REMEDIES:
        raise MachineError(
            f"{what} cannot be read for a fault of this machine ({os.strerror(error.errno)}"
            f"{_limit() if error.errno == errno.EMFILE else ''}): {REMEDIES[error.errno]}"
        ) from None


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to the hard one, which needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = HIGHEST_LIMIT if hard == resource.RLIM_INFINITY else min(hard, HIGHEST_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_handles() -> int:
    """How many more files this process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (HIGHEST_LIMIT if soft == resource.RLIM_INFINITY else soft) - open_handles()


def open_handles() -> int:
    """How many files, sockets and pipes this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # one of them reads the folder


def check_open_files(workers: int, ranks: int) -> None:
    """Check that a training fits within the limit of open files.

    Counted: 64 for libraries, logs and shards, of which two suffice; eight a loader worker for its pipes; four a rank
    for the connections to it.
    Raises: MachineError that names the limit, the number needed and the remedy.
    """
    needed = 64 + 8 * workers + 4 * ranks
    if (free := free_handles()) < needed:
        in_use = open_handles()
        raise MachineError(
            f"the limit of open files is {in_use + free} (ulimit -n), and this training needs {in_use + needed}: "
            f"{in_use} are open, and 64, 8 for each of {workers} loader workers and 4 for each of {ranks} ranks come "
            f"to them: {MORE_FILES}"
        )


def _limit() -> str:
    return f", the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
