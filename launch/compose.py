"""The configuration of a training for the commands beside it: train/main.py's own composition, without starting it."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.cli import parse
from train.config import Config

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def compose_config(overrides: list[str]) -> Config:
    """The configuration that `train/main.py OVERRIDES` would train with.

    Raises: ValueError in one line.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config: Config = OmegaConf.to_object(compose("config", overrides))  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise ValueError(f"the configuration cannot be composed: {' '.join(lines[:2])}") from None
    return config


def own_and_config(schema: type[T], argv: list[str] | None = None) -> tuple[T, Config]:
    """Sort key=value arguments into a command's own, which a dataclass names, and those of the training.

    Raises: SystemExit with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = {f.name for f in fields(schema)} | {"-h", "--help", "help"}  # type: ignore[arg-type]
    own = [arg for arg in argv if arg.partition("=")[0] in names]
    options = parse(schema, own)
    try:
        return options, compose_config([arg for arg in argv if arg not in own])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
