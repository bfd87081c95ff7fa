"""The command line of every command: key=value arguments read into a dataclass, --help, and errors in one line.

    python -m data.demo out=DIR seed=1

A command's arguments are a dataclass. Its docstring says what the command does, then what each field means, a line that
begins with `field: ` for each (`a, b: ` for two alike). `--help` prints that with the types and defaults.
"""

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.checks import did_you_mean

T = TypeVar("T")

HELP = {"-h", "--help", "help"}
# The exit status for what the user can mend, and that of a command which Ctrl-C ended.
MISTAKE, INTERRUPTED = 2, 130
WIDTH = 110


def location(default: str = MISSING) -> Any:
    """A field that holds a path or URL: `~` is expanded, and an empty value on the command line is refused."""
    return field(default=default, metadata={"location": True})


def command(action: Callable[[T], object], schema: type[T], argv: list[str] | None = None) -> None:
    """Run a command with the arguments of the command line.

    Exits: 0 after --help; 2 with one line for what the user can mend, a ValueError or OSError; 130 after Ctrl-C.
    """
    argv = arguments(argv)
    if HELP & set(argv):
        print(help_text(schema))
        sys.exit(0)
    try:
        action(parse(schema, argv))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(INTERRUPTED)


def arguments(argv: list[str] | None) -> list[str]:
    """The given arguments, or the process's own; without --local_rank=N, which the deepspeed launcher appends."""
    return [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank")]


def fail(error: object) -> NoReturn:
    """End with the status of a user's mistake, and one line that says what it was."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(MISTAKE)


def parse(schema: type[T], argv: list[str]) -> T:
    """Read key=value arguments into a dataclass.

    A text is taken as it stands. A list may be written a,b or [a,b].
    Raises: ValueError in one line for an unknown or missing key, or a value of a wrong type.
    """
    known = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    types = get_type_hints(schema)
    texts, rest = {}, []
    for arg in argv:
        key, equals, value = arg.partition("=")
        if not equals:
            raise ValueError(f"'{arg}' is not of the form key=value; keys: {', '.join(known)}")
        if key not in known:
            raise ValueError(f"unknown key '{key}'{did_you_mean(key, known)}; keys: {', '.join(known)}")
        if types[key] in (str, str | None):
            texts[key] = expand(key, value) if known[key].metadata.get("location") else value
        elif getattr(types[key], "__origin__", None) is list and not value.startswith("["):
            rest.append(f"{key}=[{value}]")
        else:
            rest.append(arg)
    try:
        # As YAML `prompt="a cat: red"` would be a dict, so texts take no part in it.
        values = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(rest), dict.fromkeys(texts, ""))
        missing = sorted(OmegaConf.missing_keys(values))
        if missing:
            raise ValueError(f"missing {', '.join(f'{name}=...' for name in missing)}; --help says what each key means")
        result: T = OmegaConf.to_object(values)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    for key, text in texts.items():
        setattr(result, key, text)
    return result


def expand(key: str, value: str) -> str:
    """A location as it was typed, with `~` expanded.

    Raises: ValueError if it is empty.
    """
    if not value.strip():
        raise ValueError(f"{key}= is empty: give a path, or leave the key out")
    return str(Path(value).expanduser()) if value.startswith("~") else value


def help_text(schema: type, usage: str = "") -> str:
    """What a command does, how it is called, and each key with its type, default and meaning."""
    intro, _ = describe(schema)
    rows = list(keys(schema))
    required = " ".join(f"{name}=..." for name, _, default, _ in rows if default == "required")
    usage = usage or f"python -m {_module()} {required} [key=value ...]"
    width = min(max(len(name) for name, *_ in rows), 28)
    lines = [intro, "", f"usage: {usage}", ""]
    for name, kind, default, meaning in rows:
        told = f"{kind}, {default}. {meaning}"
        indent = " " * (width + 4)
        head = f"  {name:<{width}}  "
        lines += textwrap.wrap(told, WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False)
    return "\n".join(lines)


def keys(schema: type, before: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key of a dataclass, those of dataclasses within it included."""
    _, meanings = describe(schema)
    types = get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(types[f.name]):
            yield from keys(types[f.name], f"{before}{f.name}.")
        else:
            yield before + f.name, _kind(f, types[f.name]), _default(f), meanings.get(f.name, "")


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


def _module() -> str:
    """How the command was called: data.demo for `python -m data.demo`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _kind(f: Field, kind: Any) -> str:
    if f.metadata.get("location"):
        return "path"
    return {str: "text", bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)) if isinstance(kind, type)
                                                    and not hasattr(kind, "__origin__") else str(kind))  # fmt: skip


def _default(f: Field) -> str:
    value = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
    if value is NO_DEFAULT or (isinstance(value, str) and value == MISSING):
        return "required"
    if value in ("", None) or value == {}:
        return "none by default"
    if isinstance(value, bool):
        return f"{value} by default".lower()
    return f"{value:,} by default".replace(",", "_") if isinstance(value, int) else f"{value} by default"
