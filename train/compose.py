"""The configuration of a training, from an experiment in conf/ and key=value arguments."""

import re
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig
from yaml import YAMLError

from data.checks import check_choice
from data.cli import help_text, key_lines, keys, parse, set_key, split_argument, to_dataclass, unknown_key, unquoted
from train.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# What is chosen by the name of a file in conf/EXPERIMENT_OR_MODEL.
GROUPS = ("experiment", "model")
# What takes the place of Hydra's own flags.
INSTEAD = {
    ("--multirun", "-m"): "start one training for each set of values",
    ("--config-name", "-cn", "--config-dir", "-cd"): "choose a configuration by +experiment=NAME",
    ("--cfg", "-c", "--info", "-i", "--resolve"): "dry_run=true checks the configuration and prints what would run",
}
T = TypeVar("T")


def compose_config(overrides: list[str]) -> Config:
    """The checked configuration that `train/main.py OVERRIDES` trains with: config.yaml, model, experiment, OVERRIDES.

    +key=value and ++key=value mean key=value. A text is taken as it stands, but for a pair of quotes around it.
    Raises: ValueError in one line.
    """
    chosen, values = {}, []
    for arg in overrides:
        _refuse_flag(arg)
        key, value = split_argument(arg.lstrip("+"))
        value = unquoted(value)
        if key in GROUPS:
            check_choice(key, value, names(key))
            chosen[key] = value
        else:
            values.append((key, value))
    if "experiment" not in chosen:
        raise ValueError(f"name an experiment, as +experiment=NAME: {', '.join(names('experiment'))}")
    composed = _compose(chosen)
    for key, value in values:
        set_key(composed, Config, key, value)
    config: Config = to_dataclass(composed)
    return config


def parse_with_config(schema: type[T], argv: list[str]) -> tuple[T, Config]:
    """Read a command's own arguments, which a dataclass names, and those of the training beside them.

    Raises: ValueError in one line.
    """
    own = {f.name for f in fields(schema)}  # type: ignore[arg-type]
    known = [*own, *GROUPS, *(name for name, *_ in keys(Config))]
    of_training: list[str] = []
    of_command: list[str] = []
    for arg in argv:
        # A misspelt key belongs to the side that has the key nearest to it.
        near = get_close_matches(arg.lstrip("+").partition("=")[0], known, 1)
        (of_command if near and near[0] in own else of_training).append(arg)
    return parse(schema, of_command), compose_config(of_training)


def help_with_training(schema: type, command: str) -> str:
    """The help page of a command that takes the arguments of a training beside its own."""
    return f"{help_text(schema, f'{command} +experiment=NAME [key=value ...]')}\n\n{training_help()}"


def training_help() -> str:
    """The part of a help page that lists experiments, models and the keys of a training."""
    lines = []
    for group in GROUPS:
        lines.append(f"{group}s, chosen by {'+' if group == 'experiment' else ''}{group}=NAME:\n")
        lines += [f"  {name:<28}  {_comment(CONF / group / f'{name}.yaml')}" for name in names(group)] + [""]
    return "\n".join([*lines, "keys of the training, over the values of the experiment:\n", *key_lines(Config)])


def names(group: str) -> list[str]:
    """The names of the experiments or models."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _refuse_flag(arg: str) -> None:
    if arg.startswith("-"):
        flag = arg.partition("=")[0]
        instead = next((text for flags, text in INSTEAD.items() if flag in flags), "arguments are key=value")
        raise ValueError(f"there is no flag {flag}: {instead}; --help lists the keys")


def _compose(chosen: dict[str, str]) -> DictConfig:
    """Compose the files. Raises: ValueError for a mistake in one of them."""
    # Imported here: it takes a while, and --help has no need of it.
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store(name="schema", node=Config)
    overrides = [f"+experiment={chosen['experiment']}", *(f"model={name}" for name in [chosen.get("model")] if name)]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, YAMLError) as error:
        files = " and ".join(f"conf/{group}/{name}.yaml" for group, name in chosen.items())
        raise ValueError(f"{files} cannot be composed: {_one_line(str(error))}") from None


def _one_line(error: str) -> str:
    """What an error of Hydra says: the mistake in the second line, then its key, or all in the first line."""
    first, *rest = error.splitlines()
    if not (key := re.search(r"full_key: (\S+)", error)):
        return first if "Could not find" in first else " ".join([first, *(line.strip() for line in rest)])
    return unknown_key(Config, key[1]) if "ConfigKeyError" in first else f"{key[1]}: {rest[0]}"


def _comment(path: Path) -> str:
    """The first comment of a file that says what it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line), "")
