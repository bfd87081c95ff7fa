"""Ctrl-C in a command: one line at once and no traceback, from the first import on."""

import os
import signal
import sys
from types import FrameType

# Exit status after Ctrl-C, as shells give it: 128 + SIGINT.
INTERRUPTED = 130

_state = {"process": 0, "acting": False, "told": False}


def handle_ctrl_c() -> None:
    """Handle Ctrl-C in this process, unless it was started with the signal ignored, as by a shell in the background.

    Until a command acts, Ctrl-C ends the process at once. Then the first one raises KeyboardInterrupt, so that what was
    begun is cleaned up, and a second one ends the process at once.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _state["process"] = os.getpid()
        signal.signal(signal.SIGINT, _on_ctrl_c)


def interrupted() -> bool:
    """Whether Ctrl-C stopped the command, which is being cleaned up then."""
    return bool(_state["told"])


def begin_to_act() -> None:
    """From here on there may be something to clean up, and the caller catches KeyboardInterrupt."""
    _state["acting"] = True


def tell_interrupted() -> None:
    """Print that Ctrl-C stopped the command, once; of several ranks only the first one does."""
    if not _state["told"]:
        _state["told"] = True
        tell("stopped by Ctrl-C")


def tell(line: str) -> None:
    """Print a line from a signal handler, on the first rank, where print() might be in the middle of another line.

    On a terminal what is there, ^C and perhaps a progress bar, keeps a line of its own.
    """
    if os.environ.get("RANK", "0") == "0":
        stderr = sys.__stderr__.fileno() if sys.__stderr__ else 2
        before = "\n" if os.isatty(stderr) else ""
        os.write(stderr, f"{before}{line}\n".encode())


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    of_child, again = os.getpid() != _state["process"], _state["told"]
    if not of_child:
        tell_interrupted()
    # Libraries catch or print what is raised while they are imported. A child that was just forked ends silently.
    if of_child or again or not _state["acting"] or _is_importing(frame):
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
