"""key=value arguments, the same for every command: `python -m data.demo out=DIR seed=1`."""

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse(schema: type[T], argv: list[str] | None = None) -> T:
    """Read key=value arguments into a dataclass; a field without a default must be given.

    Raises: SystemExit with one line that names the argument and the remedy.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    if {"-h", "--help", "help"} & set(argv):
        raise SystemExit(f"{schema.__doc__}\nArguments, as key=value: {', '.join(names)}")
    for arg in argv:
        key, equals, _ = arg.partition("=")
        if not equals:
            raise SystemExit(f"'{arg}' is not of the form key=value; known keys: {', '.join(names)}")
        if key.split(".")[0] not in names:
            raise SystemExit(f"no argument is called '{key}'; known: {', '.join(names)}")
    # Text is taken as it stands: as YAML, `prompt="a cat: red"` would be a dict and `prompt=no` false.
    texts = {f.name for f in fields(schema) if f.type in (str, str | None)}  # type: ignore[arg-type]
    given = {key: text for key, _, text in (arg.partition("=") for arg in argv) if key in texts}
    rest = [arg for arg in argv if arg.partition("=")[0] not in texts]
    try:
        values = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(rest), dict.fromkeys(given, ""))
        missing = sorted(OmegaConf.missing_keys(values))
        if missing:
            raise SystemExit(f"missing: {', '.join(f'{name}=...' for name in missing)}")
        arguments: T = OmegaConf.to_object(values)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise SystemExit(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    for key, text in given.items():
        setattr(arguments, key, text)
    return arguments


def command(action: Callable[[T], object], schema: type[T], argv: list[str] | None = None) -> None:
    """Do what the arguments ask for.

    Raises: SystemExit with one line for what the user can mend: a ValueError or OSError of the action.
    """
    try:
        action(parse(schema, argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
