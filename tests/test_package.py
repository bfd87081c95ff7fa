"""What a wheel holds, installed into a fresh environment and called from another folder; packages of other projects."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from if_train import COMMANDS, help_page, main, project_version
from tests.test_architecture import is_command, read_sources
from train.monitor import provenance

# What is no command of a user: before an install, in a launcher, in the smoke run.
NOT_LISTED = {"launch.check_machine", "launch.preflight", "launch.smoke_time"}
BUILD = "import sys; from setuptools import build_meta; {}"


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    # The one environment holds neither the other's path nor what pip was told to fetch from where.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def answer(*command: object, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked(repo) -> list[str]:
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=repo)
    if listed.returncode:
        pytest.skip("not a git work tree, so it is unknown which files are the repository's")
    return [name for name in listed.stdout.split("\0") if name and (repo / name).is_file()]


@pytest.fixture(scope="module")
def built(repo, tracked, tmp_path_factory) -> tuple[set[str], Path]:
    """The files of a source distribution, and a wheel made from these, as pip makes one."""
    place = tmp_path_factory.mktemp("built")
    for name in tracked:
        (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo / name, place / "copy" / name)
    sdist = answer(sys.executable, "-c", BUILD.format(f"print(build_meta.build_sdist('{place}'))"), cwd=place / "copy")
    shutil.unpack_archive(place / sdist.split()[-1], place / "unpacked")
    (source,) = (place / "unpacked").iterdir()
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wheel = answer(sys.executable, "-c", BUILD.format(f"print(build_meta.build_wheel('{place}'))"), cwd=source)
    return files, place / wheel.split()[-1]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of a fresh environment with the wheel, which finds the other packages where this one has them."""
    place = tmp_path_factory.mktemp("environment")
    answer(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    answer(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        built[1],
        cwd=place,
    )
    # A .pth of that folder is not read, so an editable install of this project there stays out.
    packages = place / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return place / "bin"


def test_a_source_distribution_is_the_whole_repository(built, tracked):
    more = {name for name in built[0] - set(tracked) if ".egg-info/" not in name}
    assert (set(tracked) - built[0], more) == (set(), {"PKG-INFO", "setup.cfg"})


def test_a_wheel_has_all_that_runs_and_nothing_else(built, tracked):
    with zipfile.ZipFile(built[1]) as wheel:
        there = {entry.filename: entry for entry in wheel.infolist() if ".dist-info/" not in entry.filename}
        entries = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    code = {name for name in tracked if re.fullmatch(r"(train|model|data|launch)/.*\.py|conf/.*\.yaml", name)}
    assert set(there) == code | {"if_train.py", "launch/slurm/train.sbatch", "launch/slurm/bin/deepspeed"}
    assert there["launch/slurm/bin/deepspeed"].external_attr >> 16 & 0o111, "it can not be run"
    assert "if-train = if_train:main" in entries


def test_an_installed_package_answers_from_another_folder(installed, tmp_path):
    assert answer(installed / "if-train", "--help", cwd=tmp_path).splitlines() == help_page().splitlines()
    assert answer(installed / "if-train", "--version", cwd=tmp_path).strip() == project_version()
    as_command = answer(installed / "if-train", "pack", "--help", cwd=tmp_path)
    as_module = answer(installed / "python", "-m", "data.pack", "--help", cwd=tmp_path)
    assert "usage: if-train pack source=... out=..." in as_command
    assert as_command.replace("if-train pack", "python -m data.pack") == as_module
    # Composed by Hydra, from the files of the wheel.
    where = "from train.compose import *; c = compose_config(['+experiment=if_i_xl']); print(ROOT, c.steps)"
    packages = next((installed.parent / "lib").glob("*/site-packages"))
    assert answer(installed / "python", "-c", where, cwd=tmp_path).split() == [str(packages), "2420000"]
    help_of_training = answer(installed / "if-train", "train", "--help", cwd=tmp_path)
    assert "usage: if-train train +experiment=NAME" in help_of_training
    assert "deepspeed --module train.main" in help_of_training and "  if_i_xl " in help_of_training
    done = run(installed / "if-train", "train", "+experiment=if_i_xl", "stpes=1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown key 'stpes' (did you mean 'steps'?)")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_installed_package_trains_in_another_folder(installed, tmp_path):
    """The path of the README, relative, by the commands of the wheel: nothing is read from this repository."""
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def if_train(*words: str) -> str:
        return answer(installed / "if-train", *words, cwd=tmp_path, **env)

    if_train("demo", "out=shards", "samples=32")
    if_train("tiny_t5", "out=encoder")
    if_train("embed", "shards=shards", "out=text", "encoder=encoder", "tokens=16")
    small = ("steps=4", "optim.warmup_steps=2", "global_batch=8", "micro_batch=4")
    data = ("data.shards=shards", "data.text=text", "run_dir=run")
    if_train("train", "+experiment=smoke", *small, *data)
    if_train("sample", "checkpoint=run", "prompt=a red circle", "steps=2", "out=drawn")
    assert (tmp_path / "run" / "done").exists() and list((tmp_path / "drawn").rglob("*.png"))
    (start,) = (json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines())
    assert (start["version"], start["git"]) == (project_version(), "")
    assert start["launch"][1] == "if-train train"
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["versions"]["if-stage1-train"] == project_version()


def test_every_command_is_listed():
    sources = read_sources("train", "data", "launch")
    commands = {path for path, source in sources.items() if path.count("/") == 1 and is_command(source)}
    assert {path[:-3].replace("/", ".") for path in commands} == set(COMMANDS.values()) | NOT_LISTED


def test_a_misspelt_command_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["pakc", "out=x"])
    assert capsys.readouterr().err == (
        "error: there is no command 'pakc' (did you mean 'pack'?); if-train --help lists them\n"
    )


def stand_in_front(folder: Path, name: str) -> tuple[Path, Path]:
    """A package of another project, and a module of the same name, each in a folder of its own."""
    package, module = folder / "package" / name / "__init__.py", folder / "module" / f"{name}.py"
    for file in (package, module):
        file.parent.mkdir(parents=True)
        file.write_text("print('imported')")
    return package, module


@pytest.mark.parametrize("name", ["data", "model", "train"])
def test_a_package_of_another_project_is_told_and_not_imported(repo, tmp_path, name):
    command = (sys.executable, "-m", "launch.plan" if name == "train" else "train.report", "--help")
    for found, folder in zip(stand_in_front(tmp_path, name), ("package", "module"), strict=True):
        done = run(*command, cwd=tmp_path / folder, PYTHONPATH=str(repo))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: Python finds another project's '{name}', '{found}', before this project's, '{repo / name}': run "
            "the command in another folder, or as if-train COMMAND, which does not look in the current one\n"
        )


def test_a_package_of_another_project_on_the_path(repo, tmp_path):
    """Told by if-train too; a program that imports ours gets an error with the same words."""
    stand_in_front(tmp_path, "data")
    path = os.pathsep.join([str(tmp_path / "package"), str(repo)])
    if_train = "import sys; del sys.path[0]; from if_train import main; main(['pack', '--help'])"
    done = run(sys.executable, "-c", if_train, cwd=tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith(f"take '{tmp_path / 'package'}' out of PYTHONPATH\n")
    done = run(sys.executable, "-c", "import train", cwd=tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("ImportError: Python finds another project's 'data', ")


def test_a_folder_of_pictures_called_data_is_no_package(repo, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    page = answer(sys.executable, "-m", "train.report", "--help", cwd=tmp_path, PYTHONPATH=str(repo))
    assert "usage: python -m train.report runs=..." in page


def test_the_revision_is_that_of_this_repository_or_none(repo, tmp_path, monkeypatch):
    """Not that of a repository in whose .venv the package is installed."""
    shown = run("git", "rev-parse", "HEAD", cwd=repo)
    if shown.returncode:
        pytest.skip("not a git work tree")
    assert provenance.git_revision().removesuffix("-dirty") == shown.stdout.strip()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    answer(*git, "init", "-q", cwd=tmp_path)
    answer(*git, "commit", "-q", "--allow-empty", "-m", "theirs", cwd=tmp_path)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "CODE", tmp_path / "site-packages")
    assert provenance.git_revision() == ""


@pytest.mark.parametrize("card", [["train/main.py"], ["--module", "train.main"]])
def test_the_launcher_of_a_slurm_job_takes_both_lines(repo, tmp_path, card):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s " "$@"\n')
    (tmp_path / "python").chmod(0o755)
    stand_in, path = repo / "launch/slurm/bin/deepspeed", f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = answer(stand_in, *card, "+experiment=if_i_xl", cwd=tmp_path, PATH=path)
    assert said.split() == ["-m", "launch.slurm.batch", "+experiment=if_i_xl"]
    assert run(stand_in, "--num_gpus", "2", *card, cwd=tmp_path, PATH=path).returncode == 2
