"""Files and folders that are written aside and then renamed, so that they are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# The latter is what safetensors raises where a disk is full.
WRITE_ERRORS = (OSError, SafetensorError)


class CouldNotWrite(OSError):
    """A file or folder could not be written; the message names it, the reason and the remedy."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"'{path}' could not be written ({reason}): make space there, or choose another place")
        self.path, self.reason = path, reason


@contextmanager
def atomic_file(path: str | Path, aside: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to. After the block it is flushed and becomes `path`; after an error it is removed.

    aside: the path to write to, on the same disk; `path` with .part appended by default.
    Raises: OSError that names `path` and the remedy. The block's errors about other files pass as they are.
    """
    path = Path(path)
    aside = aside or path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
    except WRITE_ERRORS as error:
        if not _is_about(aside, error):
            raise
        raise CouldNotWrite(path, _reason(error)) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write to. After the block it becomes `path`; after an error it is removed.

    Raises: OSError that names `path` and the remedy. The block's errors about other files pass as they are.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, path)
    except WRITE_ERRORS as error:
        if not _is_about(aside, error):
            raise
        raise CouldNotWrite(path, _reason(error)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Write a file or folder through the caches, so that a machine that loses its power has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_about(aside: Path, error: Exception) -> bool:
    """Whether an error is about writing `aside` rather than about what the block reads meanwhile."""
    if isinstance(error, CouldNotWrite):
        return error.path.is_relative_to(aside)
    if not isinstance(error, OSError):
        return True
    if error.errno is None:  # raised by code that has put it in words, such as data.storage.clients
        return False
    if not isinstance(error.filename, (str, Path)):  # write() and fsync() name no file
        return True
    return aside.is_relative_to(error.filename) or Path(error.filename).is_relative_to(aside)


def _reason(error: Exception) -> object:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or error
