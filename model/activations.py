"""Activations by the name that the config gives them."""

from torch import nn

from model.fewbit import MAX_BITS, FewBitGELU

FEW_BIT = {f"gelu_{bits}bit": bits for bits in range(1, MAX_BITS + 1)}
ACTIVATIONS = ("gelu", *FEW_BIT)


def make_activation(name: str, memory: str = "keep") -> nn.Module:
    """The activation called `name`: 'gelu' is the exact one, by erf; 'gelu_2bit' rounds its derivative to 2 bits.

    memory: as in model.recompute; bits are packed only where they are kept.
    Raises: ValueError for a name that is not in ACTIVATIONS.
    """
    if name == "gelu":
        return nn.GELU()
    if name in FEW_BIT:
        return FewBitGELU(FEW_BIT[name], packed=memory == "keep")
    raise ValueError(f"no activation is called '{name}'; known: {', '.join(ACTIVATIONS)}")
