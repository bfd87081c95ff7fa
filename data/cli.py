"""The command line of every command: key=value arguments read into a dataclass, --help, and errors in one line.

    python -m data.demo out=DIR seed=1

A command's arguments are a dataclass. Its docstring says what the command does, then what each field means, a line that
begins with `field: ` for each (`a, b: ` for two alike). `--help` prints that with the types and defaults.
"""

import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, field, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.interrupt import INTERRUPTED, begin_to_act, tell_interrupted
from data.progress import LogLines, be_quiet, end_lines
from data.quiet import quiet_libraries
from data.storage.machine import raise_open_file_limit

T = TypeVar("T")

HELP = {"-h", "--help", "help"}
QUIET = "-q"
QUIET_LINE = f"With {QUIET} among the arguments no progress is told, only errors and results."
# Exit statuses: a mistake that the user can fix; a training that was asked to leave and is to be started again
# (EX_TEMPFAIL of sysexits.h); one whose rank ends for a fault that
# another one tells (EX_PROTOCOL); one whose ranks found that a device makes errors.
MISTAKE, REQUEUE, LOST, CORRUPTED = 2, 75, 76, 77
WIDTH = 110
# An item of a list a,b: a comma within a pair of quotes does not part it.
ITEM = re.compile(r"""(?:^|,)\s*("[^"]*"(?=\s*(?:,|$))|'[^']*'(?=\s*(?:,|$))|[^,]*)""")
# How help and errors call a type: one value, and several in a list.
KINDS: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    # OmegaConf has no union of the two.
    Any: ("a whole number or a list", ""),
}


def location(default: Any = MISSING) -> Any:
    """A field that holds a path or URL, or a list of them: `~` is expanded, and an empty value is refused."""
    metadata = {"location": True}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def command(action: Callable[[T], object], schema: type[T], argv: list[str] | None = None) -> None:
    """Run a command with the arguments of the command line.

    Exits: 0 after --help; 2 with one line for what the user can fix, a ValueError or OSError; 130 after Ctrl-C.
    """
    run_command(lambda given: action(parse(schema, given)), lambda: help_text(schema), argv)


def run_command(
    action: Callable[[list[str]], object], help_page: Callable[[], str], argv: list[str] | None = None
) -> None:
    """Run a command that reads its arguments itself; exits as `command` does. It may open as many files as allowed."""
    argv = arguments(argv)
    if HELP & set(argv):
        print(help_page())
        sys.exit(0)
    argv = without_quiet(argv)
    quiet_libraries()
    logging.basicConfig(format="%(message)s", handlers=[LogLines(sys.stderr)])
    raise_open_file_limit()
    try:
        begin_to_act()
        action(argv)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        tell_interrupted()
        sys.exit(INTERRUPTED)
    except Exception:
        end_lines()  # before the traceback
        raise


def arguments(argv: list[str] | None) -> list[str]:
    """The given arguments, or the process's own; without --local_rank=N, which the deepspeed launcher appends."""
    return [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank")]


def without_quiet(argv: list[str]) -> list[str]:
    """The arguments without -q, which is obeyed from here on."""
    if QUIET in argv:
        be_quiet()
    return [arg for arg in argv if arg != QUIET]


def fail(error: object) -> NoReturn:
    """End with the status of a user's mistake, and one line that says what it was."""
    end_lines()
    print(f"error: {reason(error)}", file=sys.stderr)
    sys.exit(MISTAKE)


def reason(error: object) -> str:
    """What an error says; one of the operating system names the absolute path."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"'{os.path.abspath(error.filename)}': {error.strerror}"
    return str(error)


def parse(schema: type[T], argv: list[str]) -> T:
    """Read key=value arguments into a dataclass.

    A text is taken as it stands. A list may be written a,b or [a,b], an item with a comma "a,b".
    Raises: ValueError in one line for an unknown or missing key, or a value of a wrong type.
    """
    values = OmegaConf.structured(schema)
    for arg in argv:
        set_key(values, schema, *split_argument(arg))
    return to_dataclass(values)


def to_dataclass(values: DictConfig) -> Any:
    """The dataclass of a structured configuration.

    Raises: ValueError if a required key is missing, or what the dataclass itself raises.
    """
    missing = sorted(OmegaConf.missing_keys(values))
    if missing:
        raise ValueError(f"missing {', '.join(f'{name}=...' for name in missing)}; --help says what each key means")
    return OmegaConf.to_object(values)


def split_argument(arg: str) -> tuple[str, str]:
    """The key and the value of an argument.

    Raises: ValueError if it is not of the form key=value.
    """
    key, equals, value = arg.partition("=")
    if not equals or not key:
        raise ValueError(f"'{arg}' is not of the form key=value; --help lists the keys")
    return key, value


def set_key(values: DictConfig, schema: type, key: str, text: str) -> None:
    """Set a key, dotted where dataclasses lie within dataclasses, to the value that a user typed.

    Raises: ValueError in one line if the schema has no such key or the value is of a wrong type.
    """
    found = _find(schema, key)
    if found is None:
        raise ValueError(unknown_key(schema, key))
    kind, is_location = found
    if get_origin(kind) is dict or is_dataclass(kind):
        inner = [name for name, *_ in keys(schema) if name.startswith(f"{key}.")] or [f"{key}.KEY"]
        raise ValueError(f"'{key}' is a group of keys: set each by itself, such as {inner[0]}=...")
    if is_location:
        expand(key, text.strip("[]"))  # refuses an empty one, of a list too
    try:
        value = _read(text, kind, is_location)
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text} must be {kind_name(kind)}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    with open_dict(values):  # a dict takes names of the user's choice
        values.merge_with(value)


def unknown_key(schema: type, key: str) -> str:
    """The error for a key that a schema does not have, with the key that was meant and, where they are few, all."""
    parts = key.split(".")
    # NAME stands for the names in a dict, which the user chooses.
    known = [
        ".".join(parts[i] if part == "NAME" and i < len(parts) else part for i, part in enumerate(name.split(".")))
        for name, *_ in keys(schema)
    ]
    same_end = [name for name in known if name.rpartition(".")[2] == parts[-1]]
    near = get_close_matches(key, same_end, 1, cutoff=0) or get_close_matches(key, known, 1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    rest = f"keys: {', '.join(known)}" if len(known) < 20 else "--help lists the keys"
    return f"unknown key '{key}'{hint}; {rest}"


def unquoted(text: str) -> str:
    """A text without the pair of quotes around it, if there is one."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def expand(key: str, value: str) -> str:
    """A location as it was typed, with `~` expanded.

    Raises: ValueError if it is empty.
    """
    if not value.strip():
        raise ValueError(f"{key}= is empty: give a path, or leave the key out")
    return os.path.expanduser(value)


def help_text(schema: type, usage: str = "") -> str:
    """What a command does, how it is called, and each key with its type, default and meaning."""
    intro, _ = describe(schema)
    required = [f"{f.name}=..." for f in fields(schema) if _default(f) == "required"]
    usage = usage or " ".join([how_called(), *required, "[key=value ...]"])
    return "\n".join([textwrap.fill(intro, WIDTH), "", f"usage: {usage}", QUIET_LINE, "", *key_lines(schema)])


def key_lines(schema: type) -> list[str]:
    """The lines of a help page that list a schema's keys."""
    rows = list(keys(schema))
    width = min(max((len(name) for name, *_ in rows), default=0), 28)
    lines = []
    for name, kind, default, meaning in rows:
        lines += textwrap.wrap(
            f"{kind}, {default}. {meaning}", WIDTH, initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4), break_long_words=False,
        )  # fmt: skip
    return lines


def keys(schema: type, before: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key of a dataclass, those of dataclasses within it included.

    The keys of a dict of dataclasses are listed under the name NAME.
    """
    _, meanings = describe(schema)
    types = get_type_hints(schema)
    for f in fields(schema):
        name, kind = before + f.name, types[f.name]
        if is_dataclass(kind):
            yield from keys(kind, f"{name}.")  # type: ignore[arg-type]
        else:
            yield name, kind_name(kind, bool(f.metadata.get("location"))), _default(f), meanings.get(f.name, "")
        if inner := _in_dict(kind):
            yield from keys(inner, f"{name}.NAME.")


def describe(schema: type) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass: what it says of the whole, and what of each field."""
    names = {f.name for f in fields(schema)}
    intro: list[str] = []
    meanings: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in [*textwrap.dedent(schema.__doc__ or "").splitlines(), ""]:
        head, colon, rest = line.strip().partition(":")
        named = [name.strip() for name in head.split(",")]
        if colon and set(named) <= names:
            current = [rest.strip()]
            meanings |= dict.fromkeys(named, current)
        elif not line.strip():
            current = None
        elif current is not None:
            current.append(line.strip())
        else:
            intro.append(line.strip())
    return " ".join(intro), {name: " ".join(parts) for name, parts in meanings.items()}


def kind_name(kind: Any, is_location: bool = False) -> str:
    """A type in the words of help and errors."""
    kind = _without_none(kind)
    if is_location:
        return "a list of paths" if get_origin(kind) is list else "a path"
    if of_groups := _in_list(kind):
        return f"a list as [{{{', '.join(f'{f.name}: ...' for f in fields(of_groups))}}}]"
    if get_origin(kind) in (list, tuple):
        (inner, *_), number = get_args(kind), f"{len(get_args(kind))} " if get_origin(kind) is tuple else ""
        return f"a list of {number}{KINDS[inner][1]}" if inner in KINDS else "a list"
    if get_origin(kind) is dict or is_dataclass(kind):
        return "a group of keys"
    return KINDS[kind][0] if kind in KINDS else str(kind)


def _find(schema: type, key: str) -> tuple[Any, bool] | None:
    """The type of a key and whether it is a location; None if the schema has no such key."""
    name, dot, rest = key.partition(".")
    f = next((f for f in fields(schema) if f.name == name), None)
    if f is None:
        return None
    kind = get_type_hints(schema)[name]
    if inner := _in_dict(kind):
        kind, (_, dot, rest) = (inner, rest.partition(".")) if dot else (kind, ("", "", ""))
    if dot:
        return _find(kind, rest) if is_dataclass(kind) else None  # type: ignore[arg-type]
    return kind, bool(f.metadata.get("location"))


def _in_list(kind: Any) -> type | None:
    """The dataclass that a list holds, if the type is such a list."""
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    return inner if is_dataclass(inner) else None  # type: ignore[return-value]


def _in_dict(kind: Any) -> type | None:
    """The dataclass that a dict holds under names of the user's choice, if the type is such a dict."""
    inner = get_args(kind)[-1] if get_origin(kind) is dict else None
    return inner if is_dataclass(inner) else None  # type: ignore[return-value]


def _read(text: str, kind: Any, is_location: bool) -> Any:
    """The value that a text stands for. Raises: ValueError, KeyError if it stands for none of this type."""
    if kind != (kind := _without_none(kind)) and text == "null":
        return None
    if kind is Any:
        try:
            return int(text)
        except ValueError:
            return _read(text, list[str], is_location)
    if of_groups := _in_list(kind):
        return _read_groups(text, of_groups)
    if get_origin(kind) in (list, tuple):
        inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        parts = [unquoted(part.strip()) for part in ITEM.findall(inside)] if inside.strip() else []
        inner = get_args(kind)
        if get_origin(kind) is tuple and len(parts) != len(inner):
            raise ValueError
        return [_read(part, inner[0], is_location) for part in parts]
    if kind is str:
        return _literal(os.path.expanduser(text) if is_location else text)
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)


def _read_groups(text: str, schema: type) -> list[dict[str, Any]]:
    """The groups of keys of a list in YAML: [{key: value, ...}, ...]. Raises: ValueError."""
    try:
        groups = yaml.safe_load(text)
        if not isinstance(groups, list):
            raise ValueError
        values = [OmegaConf.merge(OmegaConf.structured(schema), group) for group in groups]
        return [OmegaConf.to_container(value) for value in values]  # type: ignore[misc]
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, TypeError, AttributeError):
        raise ValueError from None


def _literal(text: str) -> str:
    """A text as OmegaConf must be given it to keep it as it stands: ${...} would be a reference to another key."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def how_called() -> str:
    """How the command was called: `python -m data.demo`, or `if-train demo`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # if_train puts its command into argv, and has no spec as a script.
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec and spec.name != "if_train" else sys.argv[0]


def _default(f: Field) -> str:
    value = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
    if value is NO_DEFAULT or (isinstance(value, str) and value == MISSING):
        return "required"
    if value in ("", None) or value in ({}, []):
        return "optional"
    if isinstance(value, bool):
        return f"{value} by default".lower()
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return f"[{', '.join(map(_as_yaml, value))}] by default"
    if isinstance(value, (list, tuple)):
        return f"{','.join(map(str, value))} by default"
    return f"{value:,} by default".replace(",", "_") if isinstance(value, int) else f"{value} by default"


def _as_yaml(group: Any) -> str:
    return "{" + ", ".join(f"{f.name}: {getattr(group, f.name)}" for f in fields(group)) + "}"
