"""Checks of the values that a user types; each error names the key, the value and what would be right."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

# The value of a size that follows the number of samples; train/compose.py has the rule.
FROM_DATA = -1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error: the known word nearest to a misspelt one, or '' if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def count(number: int, noun: str) -> str:
    """A number with its noun: '1 shard', '2,000 shards'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def one_line(text: str, width: int = 100) -> str:
    """A text as a message repeats it: of at most `width` characters, without line breaks, in printable UTF-8."""
    if len(text) > width:
        text = f"{text[: width - 23]}...{text[-20:]}"
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises: ValueError if the value is none of the known ones."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name}={value} must be one of {', '.join(known)}{did_you_mean(str(value), known)}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises: ValueError if the value is smaller, infinite or not a number."""
    if not least <= value < math.inf:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_size(name: str, value: int, least: int) -> None:
    """Raises: ValueError if the value is smaller, and not FROM_DATA."""
    if value != FROM_DATA:
        check_at_least(name, value, least)


def check_share(name: str, value: float) -> None:
    """Raises: ValueError if the value does not lie between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie between 0 and 1")


def check_absent(name: str, path: str) -> None:
    """Raises: ValueError if something lies at a path that is to be written."""
    if path and Path(path).exists():
        raise ValueError(f"{name}={Path(path).absolute()} exists already: choose another {name}=, or delete it")
