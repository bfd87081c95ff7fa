"""The activations by their names in the config."""

from torch import nn

from model.fewbit import MAX_BITS, FewBitGELU

FEW_BIT = {f"gelu_{bits}bit": bits for bits in range(1, MAX_BITS + 1)}


def make_activation(name: str, recompute: str = "none") -> nn.Module:
    """The activation called `name`, one of model.config.ACTIVATIONS.

    recompute: one of model.config.RECOMPUTE; bits are packed only with 'none', where backward keeps them.
    """
    return nn.GELU() if name == "gelu" else FewBitGELU(FEW_BIT[name], packed=recompute == "none")
