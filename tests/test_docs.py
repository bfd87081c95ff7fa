"""Every path, link, module, command, key and make target that the README and docs/ name exists.

python -m tests.test_docs        writes the table of keys in docs/reference/configuration.md
"""

import ast
import fnmatch
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from data.cli import keys
from if_train import COMMANDS
from train.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "docs/reference/configuration.md"
# The changelog names what is gone, so its spans are not looked up.
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
PACKAGES = ("train", "model", "data", "launch", "tests")
SOURCE = (".py", ".md", ".yaml", ".sh", ".sbatch", ".toml")
# Files with such names that a user or another program writes.
NOT_OURS = {"README.md", "spiece.model"}
# Folders inside an export or a run, and one that a training makes beside the code.
FOLDERS = {"unet/", "scheduler/", "image_noising_scheduler/", "tokenizer/", "text_encoder/", "RUN_DIR/samples/",
           "RUN_DIR/quarantine/", "RUN_DIR/checkpoints/", "RUN_DIR/tensorboard/", ".compiled/"}  # fmt: skip
# Arguments and names of diffusers, torch and wandb; key=value itself.
FOREIGN_KEYS = {"key", "clean_caption", "cycle_momentum", "fullgraph", "reducing_gap", "learn_sigma"}
FOREIGN_NAMES = {"wandb.alert"}
CONFIG_KEYS = {name.replace(".NAME.", ".*.") for name, *_ in keys(Config)}
SECTIONS = {key.partition(".")[0] for key in CONFIG_KEYS if "." in key}


# What a page names.


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> tuple[str, str]:
    """The prose, and the text of the code blocks; continued lines are joined."""
    prose, code, fenced = [], [], False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return "\n".join(prose), "\n".join(code).replace("\\\n", " ")


def spans(prose: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose)


def links(prose: str) -> list[str]:
    """Targets of links and images within the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


def command_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, and the spans of the prose, without comments and the brackets of optional arguments."""
    prose, code = blocks(text)
    for line in [*code.splitlines(), *spans(prose)]:
        line = re.sub(r"(^|\s)#.*", "", line).replace(" [", " ").rstrip("]")
        yield line.partition("  ")[0] if line.startswith("make ") else line


# What there is.


@cache
def files() -> frozenset[str]:
    """The repository's files and folders, folders with a slash at the end."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git work tree, so there is no telling which files are the repository's")
    found = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    folders = {f"{parent.as_posix()}/" for name in found for parent in Path(name).parents}
    return frozenset(found | folders)


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))


@cache
def anchors(page: str) -> frozenset[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def module_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_in(module: str) -> dict[str, ast.AST]:
    """What a module defines or imports at its top level, by name."""
    path = module_file(module)
    found: dict[str, ast.AST] = {}
    for node in tree_of(path).body if path else []:
        for part in node.body if isinstance(node, ast.If) else [node]:
            if isinstance(part, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name: part for alias in part.names}
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                goals = part.targets if isinstance(part, ast.Assign) else [part.target]
                found |= {goal.id: part for goal in goals if isinstance(goal, ast.Name)}
            elif isinstance(part, ast.FunctionDef | ast.ClassDef):
                found[part.name] = part
    return found


def argument_classes(module: str) -> Iterator[ast.ClassDef]:
    """The dataclasses that a command's main(), or what it runs as a script, names: those of its arguments."""
    names, path = names_in(module), module_file(module)
    scripts = [node for node in tree_of(path).body if isinstance(node, ast.If)] if path else []
    for node in (node for part in [*scripts, names.get("main")] if part for node in ast.walk(part)):
        found, name = (names.get(node.id), node.id) if isinstance(node, ast.Name) else (None, "")
        while isinstance(found, ast.ImportFrom) and (found.module or "").startswith(PACKAGES):
            alias = next(alias for alias in found.names if (alias.asname or alias.name) == name)
            name, found = alias.name, names_in(found.module or "").get(alias.name)
        if isinstance(found, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in found.decorator_list):
            yield found


@cache
def keys_of(module: str) -> frozenset[str]:
    """The keys of a command; of one that takes the training's keys or passes its rest on, those too."""
    own = {field.target.id for found in argument_classes(module) for field in found.body
           if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}  # fmt: skip
    if module in ("tests.benchmarks.over_training", "tests.benchmarks.averaging_length"):
        return frozenset(own) | keys_of("train.evaluate")
    return frozenset(own | CONFIG_KEYS if module.startswith("launch.") or module == "train.main" else own)


# What is wrong.


def link_fault(page: str, target: str) -> str:
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    if not path.exists():
        return f"no file {name}"
    if anchor and anchor not in anchors(path.resolve().relative_to(ROOT).as_posix()):
        return f"no heading #{anchor} in {name or page}"
    return ""


def path_fault(span: str) -> str:
    """Spans that look like paths of the repository: of a source file, or below one of its folders."""
    if not re.fullmatch(r"[\w.*/-]+", span) or span in FOLDERS | NOT_OURS:
        return ""
    first, slash, rest = span.partition("/")
    if not (span.endswith((*SOURCE, "/")) or (slash and rest and f"{first}/" in files())):
        return ""
    found = fnmatch.filter(files(), span) or fnmatch.filter(files(), f"{span}/")
    return "" if found else f"no file or folder {span}"


def dotted_fault(span: str) -> str:
    """Spans such as data.index, optim.lr_peak, train.sampling.sampler.sample: a module, something in one, or a key."""
    name = re.sub(r"\(.*\)$", "", span)
    first, dot, _ = name.partition(".")
    if not dot or not re.fullmatch(r"\w+(\.[\w*]+)+", name) or name.endswith((*SOURCE, ".json", ".jsonl")):
        return ""
    if name in FOREIGN_NAMES:
        return ""
    if first not in SECTIONS | set(PACKAGES) or is_key(name, CONFIG_KEYS) or module_file(name):
        return ""
    module, _, last = name.rpartition(".")
    return "" if last in names_in(module) else f"{name} is no module, nothing in one, and no key of the configuration"


def is_key(name: str, known: frozenset[str] | set[str]) -> bool:
    """Whether a key, or a pattern of keys, is among those known; NAME or any other word stands for `*`."""
    if not re.fullmatch(r"[\w.*]+", name):
        return False
    as_pattern = re.compile(re.escape(name).replace(r"\*", ".+"))
    return any(
        as_pattern.fullmatch(key) or re.fullmatch(re.escape(key).replace(r"\*", r"[\w-]+"), name) for key in known
    )


def assignment_fault(span: str) -> str:
    """Spans such as steps=500: a key of the configuration or of some command."""
    faults = [argument_fault(part, every_key()) for part in span.split() if re.match(r"[+a-z]", part)]
    return next(filter(None, faults), "") if "=" in span and re.match(r"\+?[a-z][\w.*]*=", span) else ""


@cache
def every_key() -> frozenset[str]:
    commands = [path[:-3].replace("/", ".") for path in files() if path.endswith(".py") and path.startswith(PACKAGES)]
    return frozenset(CONFIG_KEYS | FOREIGN_KEYS).union(*map(keys_of, commands))


def argument_fault(argument: str, known: frozenset[str]) -> str:
    key, equals, value = argument.strip("'\"").partition("=")
    if not equals or not re.fullmatch(r"\+?[a-z][\w.*]*", key):
        return ""
    key = key.lstrip("+")
    if key == "experiment" or (key == "model" and known >= CONFIG_KEYS):
        if f"conf/{key}/{value}.yaml" not in files() and value.islower():
            return f"no conf/{key}/{value}.yaml"
        return ""
    return "" if is_key(key, known) else f"no key {key}"


def command_faults(line: str) -> Iterator[str]:
    words = line.split()
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if before in ("-m", "--module") and word.startswith(tuple(f"{package}." for package in PACKAGES)):
            if not module_file(word):
                yield f"no module {word}"
                return
            main = f"{word}.__main__"
            arguments, known = words[i + 1 :], keys_of(main if module_file(main) else word)
        elif before == "if-train" and not word.startswith("-") and not word.isupper():
            if word not in COMMANDS:
                yield f"no command if-train {word}"
                return
            arguments, known = words[i + 1 :], keys_of(COMMANDS[word])
        elif word in ("train/main.py", "launch/slurm/train.sbatch"):
            arguments, known = words[i + 1 :], frozenset(CONFIG_KEYS)
        elif word == "make" and i == 0:
            yield from (f"no target {w} in the Makefile" for w in words[1:] if "=" not in w and w not in targets())
            return
        else:
            continue
        yield from filter(None, (argument_fault(argument, known) for argument in arguments))
        return


def import_faults(code: str) -> Iterator[str]:
    for module, listed in re.findall(r"^from ([\w.]+) import (.+)$", code, re.MULTILINE):
        if module.split(".")[0] in PACKAGES:
            known = names_in(module)
            for name in (part.strip() for part in listed.split(",")):
                if name not in known and not module_file(f"{module}.{name}"):
                    yield f"no {name} in {module}"


def page_faults(page: str, text: str) -> list[str]:
    prose, code = blocks(text)
    looked_at: list[tuple[Callable[[str], str], list[str]]] = [
        (lambda target: link_fault(page, target), links(prose)),
        (path_fault, spans(prose)),
        (dotted_fault, spans(prose)),
        (assignment_fault, spans(prose)),
    ]
    found = [fault for fault_of, things in looked_at for fault in map(fault_of, things) if fault]
    found += [fault for line in command_lines(text) for fault in command_faults(line)]
    imports = "\n".join([code, *spans(prose)])
    return [f"{page}: {fault}" for fault in [*found, *import_faults(imports)]]


# The table of keys.


def key_table() -> str:
    def cell(text: str) -> str:
        return text.replace("|", r"\|")

    rows = [
        f"| `{name}` | {cell(kind)} | {cell(default)} | {cell(meaning)} |"
        for name, kind, default, meaning in keys(Config)
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def with_table(page: str) -> str:
    head, _, _ = page.partition("| key | type |")
    return head + key_table()


# The tests.


@pytest.mark.parametrize("page", PAGES)
def test_all_that_a_page_names_exists(page):
    faults = page_faults(page, read(page))
    assert not faults, "\n".join(faults)


def test_every_page_and_picture_is_linked_to():
    linked = {
        ((ROOT / page).parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in links(blocks(read(page))[0])
    }
    there = {ROOT / name for name in files() if name.startswith("docs/") and not name.endswith("/")}
    assert not {path.relative_to(ROOT).as_posix() for path in there - linked}


def test_the_readme_shows_every_folder():
    for top in ("train", "data", "launch"):
        for folder in (name for name in files() if re.fullmatch(rf"{top}/\w+/", name)):
            assert f"      {folder.split('/')[1]}/ " in read("README.md"), folder


def test_comments_and_messages_name_pages_that_exist():
    kinds = (".py", ".yaml", ".toml", ".sh", ".sbatch", ".txt")
    for name in files() - {"tests/test_docs.py"}:  # which names pages that do not exist
        for page in re.findall(r"\bdocs/[\w/]+\.(?:md|png)", read(name) if name.endswith(kinds) else ""):
            assert page in files(), f"{name} names {page}"


def test_the_table_of_keys_is_that_of_the_dataclasses():
    page = CONFIGURATION.read_text(encoding="utf-8")
    assert page == with_table(page), "python -m tests.test_docs writes it anew"


@pytest.mark.parametrize(
    "text",
    [
        "see [the page](docs/nowhere.md)",
        "see [the heading](docs/recipe.md#no-such-heading)",
        "![a picture](docs/images/none.png)",
        "in `train/lopo.py`",
        "in `trian/loop.py`",
        "in `conf/experiment/smok.yaml`",
        "in `data/lodaer/`",
        "in `tests/test_hostle*.py`",
        "`data.storage.tras`",
        "`train.sampling.sampler.smaple`",
        "`optim.lr_paek` sets it",
        "`data.streems=4`",
        "`steps=10 micro_bacth=4`",
        "`+experiment=smoek`",
        "`make smoek`",
        "    make tset    # the tests",
        "    python -m data.pakc source=DIR out=DIR",
        "    python -m data.pack souce=DIR out=DIR",
        "    python -m data.pack source=DIR \\\n        uot=DIR",
        "    python -m launch.plan +experiment=if_i_xl nodse=64",
        "    python -m launch.plan +experiment=if_i_xl optim.lr_paek=1",
        "    deepspeed --num_gpus 1 train/main.py +experiment=smoke stpes=4",
        "    deepspeed --num_gpus 1 train/main.py +experiment=smoek",
        "    deepspeed train/main.py +experiment=smoke model=if_i_xxl",
        "    deepspeed --module train.main +experiment=smoke stpes=4",
        "    if-train pakc source=DIR out=DIR",
        "`if-train pack souce=DIR out=DIR`",
        "    deepspeed --module train.evaluate chekpoint=DIR",
        "    sbatch launch/slurm/train.sbatch +experiment=if_i_xl stpes=4",
        "```python\nfrom train.sampling.sampler import make_shceduler\n```",
        "`from model import UNett`",
    ],
)
def test_what_is_misspelt_is_seen(text):
    assert page_faults("README.md", text)


def test_what_is_right_passes():
    text = """`train/loop.py`, `conf/model`, `tests/test_hostile*.py`, `data/loader/`, `data.pack`, `data.images.*`,
`a.jpg`, `optim.lr_peak`, `data.mixture.*.weight`, `train.sampling.sampler.sample`, `steps=500`, `+experiment=smoke`,
`make lint`

    python -m data.pack source=DIR out=DIR [shard_size=10]   # packs=it
    python -m launch.plan +experiment=if_i_xl nodes=64 optim.lr_peak=1e-4
    if-train train +experiment=smoke steps=4
    if-train --help
    deepspeed --num_gpus 2 train/main.py +experiment=NAME data.mixture.art.weight=2 \\
        model=if_i_m dry_run=true
"""
    assert not page_faults("README.md", text)


if __name__ == "__main__":
    CONFIGURATION.write_text(with_table(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")
