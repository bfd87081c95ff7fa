"""The configuration of a training: from an experiment in conf/ and key=value arguments, and sizes from its data."""

import re
from dataclasses import fields
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig
from yaml import YAMLError

from data.checks import FROM_DATA, check_choice, count
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
# The rule of the sizes that follow the data.
# Times that each sample is seen, unless that is fewer steps than LEAST or more than MOST.
VISITS = 100
LEAST, MOST = 1_000, 50_000
# Steps are a multiple of this, so that the intervals below divide them.
WHOLE = 100
# Shares of the steps, and the most steps of a warm-up and between two checkpoints or validations.
WARMUP, SAVE, SAMPLE = 10, 20, 5
MOST_WARMUP = MOST_BETWEEN = 1_000
MOST_STREAMS = 8
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


def follow_data(config: Config, samples: int) -> str:
    """Set each size that is -1 by the number of samples. A value that is given stays, and the others follow it.

    Returns what was set, in a line; '' for nothing.
    Raises: ValueError if a size that is given does not go with the others.
    """
    unset = sizes_to_set(config)
    if not unset:
        return ""
    rule = sizes(config, samples)
    for key in unset:
        owner, name = _field(config, key)
        setattr(owner, name, rule[key])
    config.__post_init__()  # the checks of one size by another
    visits = f"{config.steps * config.global_batch / samples:,.0f} visits of each"
    set_here = ", ".join(f"{key}={rule[key]}" for key in unset)
    return f"sizes that follow {count(samples, 'sample')}: {set_here}; {visits}"


def sizes_to_set(config: Config) -> list[str]:
    """The keys that are -1."""
    return [key for key in sizes(config, samples=1) if getattr(*_field(config, key)) == FROM_DATA]


def sizes(config: Config, samples: int) -> dict[str, int]:
    """The rule: by key the size that follows the number of samples, or the steps where those are given."""
    steps = config.steps
    if steps == FROM_DATA:
        wanted = min(max(VISITS * samples / config.global_batch, LEAST), MOST)
        steps = -(-int(wanted) // WHOLE) * WHOLE
    between = min(max(steps // SAVE, 1), MOST_BETWEEN)
    held_out = config.data.validation.shards or config.data.validation.share
    # A stream shuffles whole blocks of its part of an epoch, so more streams than blocks would mix less.
    blocks = samples // (config.data.shuffle_block * config.data.phases)
    return {
        "steps": steps,
        "optim.warmup_steps": min(max(steps // WARMUP, 2), MOST_WARMUP),
        "data.streams": min(max(blocks, 1), MOST_STREAMS, config.global_batch),
        "save_every": between,
        "validate_every": between if held_out else 0,
        "sample.every": max(steps // SAMPLE, 1),
    }


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


def _field(config: Config, key: str) -> tuple[Any, str]:
    """The dataclass that has a dotted key, and the key's name there."""
    *groups, name = key.split(".")
    return reduce(getattr, groups, config), name
