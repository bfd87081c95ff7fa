"""The net and its diffusion as a library: `from model import UNet, UNetConfig, Diffusion, training_losses`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import UNetConfig
    from model.diffusion import Diffusion
    from model.losses import training_losses
    from model.super_resolution import SuperResolutionUNet
    from model.unet import UNet

__all__ = ["Diffusion", "SuperResolutionUNet", "UNet", "UNetConfig", "training_losses"]

_MODULES = {
    "Diffusion": "model.diffusion",
    "SuperResolutionUNet": "model.super_resolution",
    "UNet": "model.unet",
    "UNetConfig": "model.config",
    "training_losses": "model.losses",
}


def __getattr__(name: str) -> object:
    # Imported when first asked for, since torch takes seconds to import and model.config has no need of it.
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
