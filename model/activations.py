"""Activations by the name that the config gives them."""

from torch import nn

ACTIVATIONS = ("gelu",)


def make_activation(name: str) -> nn.Module:
    """The activation called `name`: 'gelu' is the exact one, by erf.

    Raises: ValueError for a name that is not in ACTIVATIONS.
    """
    if name == "gelu":
        return nn.GELU()
    raise ValueError(f"no activation is called '{name}'; known: {', '.join(ACTIVATIONS)}")
