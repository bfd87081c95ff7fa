"""A program on a pseudo-terminal of its own, and what its screen shows."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COLUMNS = 120


def take_terminal() -> None:
    """In the child before it runs its program: a terminal that is its input alone sends it Ctrl-C."""
    with suppress(OSError):  # it has none, or one of others
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Runs a program whose input, output and errors are a terminal, from which Ctrl-C comes as from a keyboard.

    start: starts it, as Popen with what it is given; the child calls take_terminal.
    """

    def __init__(self, start: Callable[..., subprocess.Popen]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self.said = ""
        self.process = start(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)

    def wait_for(self, words: str) -> None:
        """Read until the program has said the words."""
        while words not in self.said:
            assert self._read(), self.said

    def press_ctrl_c(self) -> None:
        """Type it, and read until the terminal shows it."""
        before = self.said.count("^C")
        os.write(self._ours, b"\x03")
        while self.said.count("^C") == before:
            assert self._read(), self.said

    def end(self) -> int:
        """Read until the program has ended; its exit status."""
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(60)

    def screen(self) -> list[str]:
        """The lines as they are seen. The last one is where the cursor is."""
        return screen(self.said)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 4096)
        except OSError:  # EIO: the program has closed it
            return False
        self.said += data.decode()
        return bool(data)


def on_terminal(command: Sequence[str]) -> Terminal:
    """A command of the repository on a terminal; its Ctrl-C arrives even if the tests run where it is ignored."""

    def begin() -> None:
        take_terminal()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return Terminal(partial(subprocess.Popen, command, cwd=ROOT, preexec_fn=begin))


def screen(said: str) -> list[str]:
    """The lines that a terminal shows of what a program said, without blanks at their ends."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+|\x1b", said):
        if part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        else:
            assert part != "\x1b", "a sequence that is not known here"
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]
