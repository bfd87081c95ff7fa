"""The house's rules, read from the source: which way imports run, how long things grow, what they are called."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("train", "model", "data", "launch")
# Who may import which of the other rooms.
ALLOWED = {"train": {"model", "data"}, "launch": {"model", "data", "train"}, "model": set(), "data": set()}
# Whose import is kept to which files; the rooms model and data are told apart from these by ALLOWED.
ONLY_IN = {
    "deepspeed": {"train/engine.py"},
    "bitsandbytes": {"train/engine.py"},
    "wandb": {"train/monitor/tracker.py"},
}
NOT_IN = {"hydra": {"model", "data"}}
LONGEST_FUNCTION = 80
LONGEST_FILE = 400
MACHINE_PATH = re.compile(r"""(?:^|[\s"'(=:`])/(?:root|home|work)/\w""", re.MULTILINE)


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted modules that a file imports, anywhere in it; `from a import b` may mean the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the room's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield ast.unparse(node.args[0]).strip("'")


def import_faults(path: str, source: str) -> list[str]:
    room = path.split("/")[0]
    faults = []
    for module in imported(ast.parse(source)):
        top = module.split(".")[0]
        if top in ROOMS and top != room and top not in ALLOWED[room]:
            faults.append(f"{path} imports {module}: {room} may import {sorted(ALLOWED[room]) or 'no other room'}")
        if top in ONLY_IN and path not in ONLY_IN[top]:
            faults.append(f"{path} imports {module}: only {', '.join(sorted(ONLY_IN[top]))} may")
        if room in NOT_IN.get(top, ()):
            faults.append(f"{path} imports {module}: {room} does not know {top}")
    return faults


def length_faults(path: str, source: str) -> list[str]:
    faults = []
    if (lines := source.count("\n")) > LONGEST_FILE:
        faults.append(f"{path}: {lines} lines; at most {LONGEST_FILE}, so split it in two rooms")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                faults.append(f"{path}:{node.lineno} {node.name}: {lines} lines; at most {LONGEST_FUNCTION}")
    return faults


def docstring_faults(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    faults = []
    if tree.body and not ast.get_docstring(tree):
        faults.append(f"{path}: the module has no docstring")
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for thing in (node, *members):
            if not isinstance(thing, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if not thing.name.startswith("_") and not told_elsewhere(thing) and not ast.get_docstring(thing):
                faults.append(f"{path}:{thing.lineno} {thing.name}: no docstring")
    return faults


def told_elsewhere(thing: ast.AST) -> bool:
    """A command's main is told by its module, forward by its class, a property by its name and type."""
    if isinstance(thing, ast.FunctionDef):
        marks = {ast.unparse(mark).split(".")[-1] for mark in thing.decorator_list}
        return thing.name in ("main", "forward") or bool(marks & {"property", "cached_property"})
    return False


def check_all(faults_of, paths: list[Path]) -> None:
    faults = [fault for path in paths for fault in faults_of(name(path), path.read_text(encoding="utf-8"))]
    assert not faults, "\n".join(faults)


def test_imports_run_one_way():
    check_all(import_faults, sources(*ROOMS))


def test_nothing_outgrows_a_page():
    check_all(length_faults, sources(*ROOMS))


def test_public_things_have_docstrings():
    check_all(docstring_faults, sources("model", "data", "train"))


def test_no_name_in_train_hides_a_module():
    """`deepspeed train/main.py` puts train/ first on sys.path, where train/x.py would stand in for any module x."""
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    foreign -= {*ROOMS, "conf", "tests"}
    for path in sources(*ROOMS):
        modules = imported(ast.parse(path.read_text(encoding="utf-8")))
        foreign |= {module.split(".")[0] for module in modules} - set(ROOMS)
    taken = {entry.stem for entry in (ROOT / "train").iterdir() if not entry.name.startswith(("__", "."))}
    assert not taken & foreign, f"rename in train/: {sorted(taken & foreign)}"


def test_no_file_names_a_machine_path():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git work tree, so there is no telling which files are tracked")
    faults = []
    for entry in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / entry).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for hit in MACHINE_PATH.finditer(text):
            faults.append(f"{entry}:{text.count(chr(10), 0, hit.start()) + 1} {hit.group().strip()}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/a.py", "import data.loader.batch"),
        ("model/a.py", "def f():\n    from data import batch"),
        ("data/a.py", "from model.unet import UNet"),
        ("data/a.py", "from train.config import Config"),
        ("data/a.py", "import hydra"),
        ("model/a.py", "from hydra.core import x"),
        ("train/a.py", "import launch.plan"),
        ("train/a.py", "import deepspeed.comm as dist"),
        ("train/a.py", "from deepspeed import comm"),
        ("train/checkpoint/format.py", "import bitsandbytes as bnb"),
        ("launch/a.py", "import wandb"),
        ("data/a.py", "import importlib\nimportlib.import_module('train.loop')"),
    ],
)
def test_a_wrong_import_is_seen(path, source):
    assert import_faults(path, source)


def test_right_imports_pass():
    assert not import_faults("train/engine.py", "import deepspeed\nimport bitsandbytes\nfrom model.unet import UNet")
    assert not import_faults("train/monitor/tracker.py", "import wandb\nfrom data.loader.batch import Batch")
    assert not import_faults("launch/plan.py", "from train.config import Config\nimport model.unet, data.shards")


def test_what_is_too_long_or_untold_is_seen():
    body = "    x = 1\n"
    assert not length_faults("train/a.py", "def f():\n" + body * (LONGEST_FUNCTION - 1))
    assert length_faults("train/a.py", "def f():\n" + body * LONGEST_FUNCTION)
    assert length_faults("train/a.py", "x = 1\n" * (LONGEST_FILE + 1))
    assert not docstring_faults("train/a.py", '"""A."""\ndef f():\n    """B."""\ndef _g(): ...\n')
    assert len(docstring_faults("train/a.py", "class A:\n    def f(self): ...\n")) == 3
    # Written in two parts, so that this file itself stays clean.
    assert MACHINE_PATH.search("see '/ro" + "ot/x'")
    assert not MACHINE_PATH.search("https://example.org/ho" + "me/x and a/wo" + "rk/b")
