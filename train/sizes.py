"""The sizes of a training that follow its data: the rule of the keys that are -1."""

from functools import reduce
from typing import Any

from data.checks import FROM_DATA, count
from train.config import Config

# Times that each sample is seen, unless that is fewer steps than LEAST or more than MOST.
VISITS = 100
LEAST, MOST = 1_000, 50_000
# Steps are a multiple of this, so that the intervals below divide them.
WHOLE = 100
# Shares of the steps, and the most steps of a warm-up and between two checkpoints or validations.
WARMUP, SAVE, SAMPLE = 10, 20, 5
MOST_WARMUP = MOST_BETWEEN = 1_000
MOST_STREAMS = 8


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


def _field(config: Config, key: str) -> tuple[Any, str]:
    """The dataclass that has a dotted key, and the key's name there."""
    *groups, name = key.split(".")
    return reduce(getattr, groups, config), name
