"""The command `if-train SUB ...`, for all commands of the packages; the version; whose packages Python finds.

`if-train pack ...` does what `python -m data.pack ...` does. This module alone has a name that other projects do not
use, so it can tell when one of their packages takes the place of data, model, train or launch.
"""

import ast
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("data", "model", "train", "launch")
# What comes before a training, the training, what comes after it. On several GPUs a training and an evaluation are
# started by a launcher, `deepspeed --module train.main`, and so is launch.preflight.
COMMANDS = {
    "demo": "data.demo",
    "fluent": "data.fluent",
    "tiny_t5": "data.tiny_t5",
    "pack": "data.pack",
    "index": "data.index",
    "inspect": "data.inspect",
    "embed": "data.embed",
    "dreambooth": "train.dreambooth",
    "plan": "launch.plan",
    "lifetime": "launch.lifetime",
    "train": "train.main",
    "report": "train.report",
    "sample": "train.sample",
    "evaluate": "train.evaluate",
    "neighbours": "train.neighbours",
    "export": "train.export",
    "export_lora": "train.export_lora",
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands.

    Exits: 2 with one line if there is no such command, or a package is not this project's; otherwise as the command.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_page())
        return
    if name == "--version":
        print(project_version())
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        _leave(f"there is no command '{name}'{hint}; if-train --help lists them")
    if foreign := foreign_package():
        _leave(foreign)
    from data.interrupt import handle_ctrl_c

    handle_ctrl_c()
    sys.argv = [f"if-train {name}", *rest]
    import_module(COMMANDS[name]).main()


def help_page() -> str:
    """Each command with the first line of its module."""
    lines = ["usage: if-train COMMAND [key=value ...]", ""]
    for name, module in COMMANDS.items():
        tree = ast.parse((HOME / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        text = (ast.get_docstring(tree) or "").partition("\n")[0].partition("`")[0]
        lines.append(f"  {name:<12}  {text.rstrip(' :.')}")
    more = (
        "if-train COMMAND --help lists its arguments. On several GPUs: deepspeed --module train.main +experiment=NAME"
    )
    return "\n".join([*lines, "", more])


def project_version() -> str:
    """The version that is installed; 'not installed' where Python finds a checkout without that."""
    from importlib.metadata import PackageNotFoundError, version  # here, since it takes longer than the rest

    try:
        return version("if-stage1-train")
    except PackageNotFoundError:
        return "not installed"


def foreign_package() -> str:
    """What Python finds in place of one of this project's packages, where, and the remedy; '' if all are ours."""
    for name in PACKAGES:
        spec = find_spec(name)
        # A folder without __init__.py has no origin; it is found only where ours is missing.
        if spec is None or spec.origin is None:
            continue
        found = Path(spec.origin).resolve()
        folder = found.parent.parent if found.name.startswith("__init__.") else found.parent
        if folder != HOME:
            return (
                f"Python finds another project's '{name}', '{found}', before this project's, '{HOME / name}': "
                f"{_remedy(folder)}"
            )
    return ""


def refuse_foreign_packages() -> None:
    """For the packages that import others of them, before they do.

    Exits: 2 with one line, in `python -m`.
    Raises: ImportError elsewhere.
    """
    if foreign := foreign_package():
        if sys.argv[:1] == ["-m"]:  # so Python calls it until it has found the command
            _leave(foreign)
        raise ImportError(foreign)


def _remedy(folder: Path) -> str:
    """How not to find what lies in a folder."""
    listed = [Path(part).resolve() for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if folder in listed:
        return f"take '{folder}' out of PYTHONPATH"
    if folder == Path.cwd():
        return "run the command in another folder, or as if-train COMMAND, which does not look in the current one"
    return "install this project into an environment of its own"


def _leave(mistake: str) -> None:
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
