"""What outsiders meet: the workflow, the hooks before a commit, the citation and the version agree with the project."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

WORKFLOW = ".github/workflows/tests.yml"


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def target_lines(repo: Path, target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (repo / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    return [line.strip() for line in lines[1].splitlines()]


def project(repo: Path, key: str) -> str:
    """A value of pyproject.toml; Python 3.10 has no reader of TOML."""
    value = re.search(rf'^{key} = "(.*)"$', (repo / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert value
    return value[1]


def test_the_workflow_runs_the_lint_and_the_tests_on_each_python(repo):
    workflow = read_yaml(repo / WORKFLOW)
    # YAML reads the word `on` as a truth value.
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["permissions"] == {"contents": "read"}
    commands = {}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60
        (checkout, setup, run) = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@") and setup["uses"].startswith("actions/setup-python@")
        assert setup["with"]["cache"] == "pip"
        assert all((repo / file).is_file() for file in setup["with"]["cache-dependency-path"].split())
        commands[name] = run["run"]
    assert commands == {"lint": "make lint PYTHON=python", "test": "make test PYTHON=python"}
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project(repo, "requires-python") == ">=3.10,<3.12" and pythons == ["3.10", "3.11"]


def test_the_hooks_before_a_commit_are_the_lint_with_pinned_tools(repo):
    """The tools are those of .venv, which constraints.txt pins: a version in a second place could differ."""
    (hooks,) = read_yaml(repo / ".pre-commit-config.yaml")["repos"]
    assert hooks["repo"] == "local"
    assert [hook["entry"] for hook in hooks["hooks"]] == target_lines(repo, "lint")
    pins = (repo / "constraints.txt").read_text(encoding="utf-8")
    for hook in hooks["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert len(re.findall(rf"^{tool}==[\d.]+$", pins, re.MULTILINE)) == 1, f"{tool} has not one version"


def test_templates_are_a_sentence(repo):
    for name in ("ISSUE_TEMPLATE/issue.md", "PULL_REQUEST_TEMPLATE.md"):
        text = (repo / ".github" / name).read_text(encoding="utf-8").split("---\n")[-1].strip()
        assert text.endswith(".") and "\n" not in text


def test_the_citation_is_of_this_version(repo):
    citation = read_yaml(repo / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors"} <= set(citation)
    assert (str(citation["version"]), citation["license"]) == (project(repo, "version"), project(repo, "license"))


def test_a_tag_of_a_release_is_the_version(repo):
    """The version stands in pyproject.toml; the tag of a release repeats it."""
    shown = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=repo, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("not a git work tree, so there are no tags")
    releases = [tag for tag in shown.stdout.split() if re.fullmatch(r"v\d.*", tag)]
    assert releases in ([], [f"v{project(repo, 'version')}"]), "change the version in pyproject.toml and CITATION.cff"
