"""Rules for the source, read from the source: which way imports run, how long files are, what has a docstring."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "model", "data", "launch")
# The other packages that each package may import.
MAY_IMPORT = {"train": {"model", "data"}, "launch": {"model", "data", "train"}, "model": set(), "data": set()}
# The other folders of data/ that each of its folders may import. Modules at the root of data/ are no folder, so all may
# import them, unless they are commands.
DATA_FOLDERS: dict[str, set[str]] = {
    "storage": set(),
    "text": {"storage"},
    "selection": {"storage"},
    "loader": {"storage", "text", "selection"},
    "inspection": {"storage", "text", "selection", "loader"},
    "prepare": {"storage", "text", "loader"},
}
# The only files that may import a library.
ONLY_IN = {
    "deepspeed": {"train/engine.py"},
    "bitsandbytes": {"train/engine.py"},
    "wandb": {"train/monitor/tracker.py"},
    "tensorboard": {"train/monitor/event_files.py"},
    "hydra": {"train/compose.py", "train/main.py"},
    "tqdm": {"data/progress.py"},
}
# The only files that may end the process. A library raises an error instead.
MAY_EXIT = {
    "data/cli.py",
    "data/interrupt.py",
    "train/main.py",
    "launch/slurm/batch.py",
    "launch/preflight.py",
    "launch/check_machine.py",
    "train/faults/preempt.py",  # a signal before the training begins
    "train/faults/watchdog.py",  # a rank that hangs
    "train/faults/node_watch.py",  # a rank of a node where another has died
}
EXITS = {"SystemExit", "exit", "quit", "sys.exit", "os._exit"}
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 400
# Most modules at the root of train/ and of data/: the commands and the pages to read first.
MAX_ROOT_MODULES = 17
MACHINE_PATH = re.compile(r"""(?:^|[\s"'(=:`])/(?:root|home|work)/\w""", re.MULTILINE)

Sources = dict[str, str]


def read_sources(*packages: str) -> Sources:
    """The text of each .py file of the packages, by its path from the repository's root."""
    paths = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it; `from a import b` gives a.b, a module or a name in a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the name of the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield ast.unparse(node.args[0]).strip("'")


def import_graph(sources: Sources) -> dict[str, set[str]]:
    """The files that each file imports, among the sources; imports inside functions count too."""

    def find(module: str) -> str | None:
        path = module.replace(".", "/")
        return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in sources), None)

    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        files = (find(name) or find(name.rpartition(".")[0]) for name in imported(ast.parse(source)))
        graph[path] = {file for file in files if file and file != path}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The files of a circle of imports, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(file: str, trail: list[str]) -> list[str]:
        if file in trail:
            return [*trail[trail.index(file) :], file]
        if file not in done:
            for target in sorted(graph[file]):
                if circle := visit(target, [*trail, file]):
                    return circle
            done.add(file)
        return []

    return next((circle for file in sorted(graph) if (circle := visit(file, []))), [])


def circle_faults(sources: Sources) -> list[str]:
    circle = find_circle(import_graph(sources))
    return [f"import circle: {' -> '.join(circle)}"] if circle else []


def package_faults(sources: Sources) -> list[str]:
    """Imports between packages, and of libraries, that are not allowed."""
    faults = []
    for path, source in sources.items():
        package = path.split("/")[0]
        for module in imported(ast.parse(source)):
            top = module.split(".")[0]
            if top in PACKAGES and top != package and top not in MAY_IMPORT[package]:
                faults.append(
                    f"{path} imports {module}: {package} may import {sorted(MAY_IMPORT[package]) or 'neither'}"
                )
            if top in ONLY_IN and path not in ONLY_IN[top]:
                faults.append(f"{path} imports {module}: only {', '.join(sorted(ONLY_IN[top]))} may")
    return faults


def folder_faults(sources: Sources) -> list[str]:
    """Imports inside a package that run up: from a folder to a command, or to a later folder of data/."""
    commands = {path for path, source in sources.items() if path.count("/") == 1 and is_command(source)}
    faults = []
    for path, targets in import_graph(sources).items():
        for target in sorted(targets):
            (package, *folders), (target_package, *target_folders) = path.split("/")[:-1], target.split("/")[:-1]
            if folders and target in commands:
                faults.append(f"{path} imports {target}: it is a command, which only other commands may import")
            if package == target_package == "data" and folders and target_folders and folders != target_folders:
                allowed = DATA_FOLDERS.get(folders[0], set())
                if target_folders[0] not in allowed:
                    faults.append(f"{path} imports {target}: data/{folders[0]} may import {sorted(allowed) or 'none'}")
    return faults


def is_command(source: str) -> bool:
    """Whether the module does something when it is run: `python -m package.module`."""
    return any(
        isinstance(n, ast.If) and "__name__ == '__main__'" in ast.unparse(n.test) for n in ast.parse(source).body
    )


def exit_faults(sources: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno} {ast.unparse(node)}: a library raises ValueError or OSError; only commands exit"
        for path, source in sources.items()
        if path not in MAY_EXIT
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in EXITS
    ]


def size_faults(sources: Sources) -> list[str]:
    faults = []
    for path, source in sources.items():
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            faults.append(f"{path}: {lines} lines; at most {MAX_FILE_LINES}, so split it")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    faults.append(f"{path}:{node.lineno} {node.name}: {lines} lines; at most {MAX_FUNCTION_LINES}")
    for package in ("train", "data"):
        modules = [path for path in sources if re.fullmatch(rf"{package}/(?!__init__)\w+\.py", path)]
        if len(modules) > MAX_ROOT_MODULES:
            faults.append(
                f"{package}/: {len(modules)} modules at its root; at most {MAX_ROOT_MODULES}, so use a folder"
            )
    return faults


def folder_without_init_faults(sources: Sources) -> list[str]:
    folders = {path.rpartition("/")[0] for path in sources}
    return [f"{folder}/ has no __init__.py" for folder in sorted(folders) if f"{folder}/__init__.py" not in sources]


def docstring_faults(sources: Sources) -> list[str]:
    faults = []
    for path, source in sources.items():
        tree = ast.parse(source)
        if tree.body and not ast.get_docstring(tree):
            faults.append(f"{path}: the module has no docstring")
        for node in tree.body:
            members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
            faults += [
                f"{path}:{thing.lineno} {thing.name}: no docstring"
                for thing in (node, *members)
                if isinstance(thing, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                if needs_docstring(thing) and not ast.get_docstring(thing)
            ]
    return faults


def needs_docstring(thing: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Public things do, except a command's main (its module has one), forward (its class has one) and properties."""
    marks = {ast.unparse(mark).split(".")[-1] for mark in thing.decorator_list}
    explained = thing.name in ("main", "forward") or bool(marks & {"property", "cached_property"})
    return not thing.name.startswith("_") and not (explained and not isinstance(thing, ast.ClassDef))


@pytest.mark.parametrize(
    "faults_of",
    [
        package_faults, folder_faults, circle_faults, exit_faults, size_faults, folder_without_init_faults,
        docstring_faults,
    ],
    ids=lambda rule: rule.__name__.removesuffix("_faults"),
)  # fmt: skip
def test_the_source_keeps_the_rule(faults_of: Callable[[Sources], list[str]]):
    packages = ("model", "data", "train") if faults_of is docstring_faults else PACKAGES
    faults = faults_of(read_sources(*packages))
    assert not faults, "\n".join(faults)


def test_no_import_changes_where_python_looks():
    """A child of a test is told the path of its parent, and could not find the test any more."""
    begun_as_program = re.compile(r'^if __name__ == "__main__":\n(?:(?:    .*)?\n)+', re.MULTILINE)
    changes = re.compile(r"^ *sys\.path(?:\[.*\] = |\.(?:insert|append|remove)\().*$", re.MULTILINE)
    faults = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        faults += [f"{file}: {hit}" for hit in changes.findall(begun_as_program.sub("", file.read_text()))]
    assert not faults, "\n".join(faults)


def test_no_name_in_train_hides_a_module():
    """`deepspeed train/main.py` puts train/ first on sys.path, where train/x.py would stand in for any module x."""
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    foreign -= {*PACKAGES, "conf", "tests"}
    for source in read_sources(*PACKAGES).values():
        foreign |= {module.split(".")[0] for module in imported(ast.parse(source))} - set(PACKAGES)
    taken = {entry.stem for entry in (ROOT / "train").iterdir() if not entry.name.startswith(("__", "."))}
    assert not taken & foreign, f"rename in train/: {sorted(taken & foreign)}"


def test_no_file_names_a_machine_path():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git work tree, so it is unknown which files are tracked")
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
        ("train/config.py", "import hydra"),
        ("launch/plan.py", "from hydra import compose"),
        ("train/a.py", "import launch.plan"),
        ("train/a.py", "import deepspeed.comm as dist"),
        ("train/a.py", "from deepspeed import comm"),
        ("train/checkpoint/format.py", "import bitsandbytes as bnb"),
        ("launch/a.py", "import wandb"),
        ("data/a.py", "import importlib\nimportlib.import_module('train.loop')"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    assert package_faults({path: source})


def test_right_imports_pass():
    right = {
        "train/engine.py": "import deepspeed\nimport bitsandbytes\nfrom model.unet import UNet",
        "train/monitor/tracker.py": "import wandb\nfrom data.loader.batch import Batch",
        "launch/plan.py": "from train.config import Config\nimport model.unet, data.shards",
    }
    assert not package_faults(right)


COMMAND = 'if __name__ == "__main__":\n    main()\n'


def test_an_import_that_runs_up_inside_a_package_is_found():
    commands = {"train/sample.py": COMMAND, "train/config.py": "x = 1\n", "data/pack.py": COMMAND}
    assert folder_faults(commands | {"train/sampling/a.py": "from train.sample import draw"})
    assert folder_faults(commands | {"train/sampling/a.py": "def f():\n    import train.sample"})
    assert folder_faults(commands | {"train/weights/a.py": "from data import pack"})
    assert not folder_faults(commands | {"train/evaluate.py": "import train.sample\n" + COMMAND})
    assert not folder_faults(commands | {"train/sampling/a.py": "from train import config"})
    layers = {"data/storage/a.py": "", "data/loader/b.py": "from data.storage import a\nimport data.loader.c",
              "data/loader/c.py": "", "data/images.py": "import data.storage.a"}  # fmt: skip
    assert not folder_faults(layers)
    assert folder_faults(layers | {"data/storage/a.py": "from data.loader.c import x"})
    assert folder_faults(layers | {"data/text/d.py": "import data.loader.c"})


def test_a_circle_of_imports_is_found_and_named():
    chain = {
        "train/a.py": "from train import b",
        "train/b.py": "import train.c.d",
        "train/c/d.py": "",
        "train/e.py": "",
    }
    assert not circle_faults(chain)
    circle = chain | {"train/c/d.py": "def f():\n    from train.a import x"}
    assert circle_faults(circle) == ["import circle: train/a.py -> train/b.py -> train/c/d.py -> train/a.py"]
    package = {"model/__init__.py": "from model.unet import UNet", "model/unet.py": "from model import UNet"}
    assert circle_faults(package)


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(2)",
        "import sys\nsys.exit(1)",
        "exit()",
        "import os\nos._exit(1)",
        "try: f()\nexcept SystemExit: 0",
    ],
)
def test_an_exit_in_a_library_is_found(source):
    assert exit_faults({"train/evaluation/a.py": source})
    assert not exit_faults({"train/main.py": source})


def test_what_is_too_long_is_found():
    body = "    x = 1\n"
    assert not size_faults({"train/a.py": "def f():\n" + body * (MAX_FUNCTION_LINES - 1)})
    assert size_faults({"train/a.py": "def f():\n" + body * MAX_FUNCTION_LINES})
    assert size_faults({"train/a.py": "x = 1\n" * (MAX_FILE_LINES + 1)})
    modules = {f"data/m{i}.py": "" for i in range(MAX_ROOT_MODULES)} | {"data/__init__.py": "", "data/text/a.py": ""}
    assert not size_faults(modules)
    assert size_faults(modules | {"data/one_more.py": ""})


def test_a_folder_without_init_is_found():
    whole = {"train/__init__.py": "", "train/a/__init__.py": "", "train/a/b.py": ""}
    assert not folder_without_init_faults(whole)
    assert folder_without_init_faults(whole | {"train/c/d.py": ""}) == ["train/c/ has no __init__.py"]


def test_a_missing_docstring_is_found():
    assert not docstring_faults({"train/a.py": '"""A."""\ndef f():\n    """B."""\ndef _g(): ...\n'})
    assert len(docstring_faults({"train/a.py": "class A:\n    def f(self): ...\n"})) == 3


def test_a_machine_path_is_found():
    # Written in two parts, so that this file itself has none.
    assert MACHINE_PATH.search("see '/ro" + "ot/x'")
    assert not MACHINE_PATH.search("https://example.org/ho" + "me/x and a/wo" + "rk/b")
