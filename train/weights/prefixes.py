"""Weights under other names than the net's: nested in a dict, or with the prefix of a wrapper or an average."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

# What wrappers put into the names, at any depth: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# A prefix of averaged weights, such as ema., ema_model. or state_dict_ema.
AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])")
# Names that a message shows.
SHOWN = 3


def flatten(state: Mapping) -> dict[str, Tensor]:
    """The tensors of nested dicts by dotted names; what is neither a tensor nor a dict is left out."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            flat[str(key)] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": tensor for name, tensor in flatten(value).items()}
    return flat


def take_off_prefix(state: dict[str, Tensor], nets: list[Collection[str]], path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights under the names of a net, and in words what was taken off, '' for nothing.

    nets: the names that a net may have. The prefix is that under which exactly these names lie, else that of most of
    them, so that an error can name what is missing.  Of several nets in the file the averaged one is taken.
    Raises: ValueError if the file holds several nets and none of them, or more than one, is an average.
    """
    plain = {_unwrapped(name): name for name in state}
    wrapped = len(plain) == len(state) and any(name not in state for name in plain)
    if wrapped:
        state = {name: state[old] for name, old in plain.items()}
    prefix = _choose(state, nets, path)
    present = [wrapper for wrapper in WRAPPERS if any(wrapper in name for name in plain.values())]
    words = [f"'{wrapper}' in the names" for wrapper in present] if wrapped else []
    if prefix:
        words.append(f"the prefix '{prefix}'")
        others = [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if others:
            more = ", ..." if len(others) > SHOWN else ""
            words[-1] += f" ({len(others)} others are left out: {', '.join(others[:SHOWN])}{more})"
    return state, " and ".join(words)


def _choose(state: Mapping[str, Tensor], nets: list[Collection[str]], path: Path) -> str:
    found: Counter[str] = Counter()
    fitting: set[str] = set()
    for net in nets:
        under = Counter(prefix for name in state for prefix, rest in _splits(name) if rest in net)
        found |= under
        fitting |= {
            prefix
            for prefix, count in under.items()
            if count == len(net) == sum(name.startswith(prefix) for name in state)
        }
    averages = [prefix for prefix in fitting if AVERAGE.search(prefix)]
    if len(fitting) > 1 and len(averages) != 1:
        prefixes = ", ".join(repr(prefix) for prefix in sorted(fitting))
        raise ValueError(f"'{path}' holds several nets (under {prefixes}): save one of them alone")
    if fitting:
        return averages[0] if len(fitting) > 1 else fitting.pop()
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")


def _splits(name: str) -> list[tuple[str, str]]:
    """All ways to cut a dotted name in a prefix and a rest."""
    ends = [0, *(match.end() for match in re.finditer(r"\.", name))]
    return [(name[:end], name[end:]) for end in ends]


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
