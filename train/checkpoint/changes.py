"""What changed in the configuration of a run that goes on: found, and written for the user."""

import math
import warnings
from collections.abc import Mapping

from train.config import OptimConfig

# Longest value in a line of changes.
LONGEST = 60
# The rate is said to jump when it changes by more than this factor.
JUMP = 2.0


def flatten(config: Mapping, prefix: str = "") -> dict[str, object]:
    """A nested configuration by dotted keys."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_changes(before: Mapping, now: Mapping) -> dict[str, list]:
    """By dotted key the values before and now, where they differ; None for a key that is on one side alone."""
    old, new = flatten(before), flatten(now)
    return {
        key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def describe_changes(changes: Mapping[str, list]) -> str:
    """In one line: `optim.lr_peak 1e-3 -> 5e-3, steps 8 -> 10`."""
    return ", ".join(f"{key} {show(old)} -> {show(new)}" for key, (old, new) in changes.items())


def show(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, float) and math.isfinite(value):
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if 0 < abs(value) < 0.01 else f"{value:g}"
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def rate_change(before: Mapping, now: Mapping, schedule_step: int) -> str:
    """How the change of the schedule changes the rate of the next step, in words; '' if it does not.

    before, now: configurations as plain values.  schedule_step: steps of the schedule that are made.
    """
    if schedule_step >= now["steps"]:
        return ""
    # A schedule that has ended stays at its last rate.
    old, new = (learning_rate(config, min(schedule_step, config["steps"] - 1)) for config in (before, now))
    if math.isclose(old, new, rel_tol=1e-3):
        return ""
    verb = "goes" if 1 / JUMP <= new / old <= JUMP else "jumps" if new > old else "falls"
    return f"the learning rate {verb} from {show(float(f'{old:.2g}'))} to {show(float(f'{new:.2g}'))}"


def learning_rate(config: Mapping, step: int) -> float:
    """The rate of the step after `step` steps of the schedule."""
    # Imported here: the engine takes seconds to import, and the report has no need of it.
    import torch

    from train.engine import one_cycle

    optim = OptimConfig(**config["optim"])
    schedule = one_cycle(torch.optim.SGD([torch.zeros(1)], lr=optim.lr_start), optim, config["steps"])
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer has stepped
        schedule.step()
    return float(schedule.get_last_lr()[0])
