"""Activations by the name that the config gives them."""

from torch import nn

from model.fewbit import MAX_BITS, FewBitGELU

FEW_BIT = {f"gelu_{bits}bit": bits for bits in range(1, MAX_BITS + 1)}
ACTIVATIONS = ("gelu", *FEW_BIT)


def make_activation(name: str) -> nn.Module:
    """The activation called `name`: 'gelu' is the exact one, by erf; 'gelu_2bit' keeps 2 bits of its derivative.

    Raises: ValueError for a name that is not in ACTIVATIONS.
    """
    if name == "gelu":
        return nn.GELU()
    if name in FEW_BIT:
        return FewBitGELU(FEW_BIT[name])
    raise ValueError(f"no activation is called '{name}'; known: {', '.join(ACTIVATIONS)}")
