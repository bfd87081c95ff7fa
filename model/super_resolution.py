"""The IF stage II UNet: predicts the noise in larger images, which it draws after a small image and the caption."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import make_activation
from model.config import UNetConfig
from model.diffusion import Diffusion
from model.embeddings import timestep_embedding
from model.unet import TextState, UNet

# How much the small image is noised where images are drawn, as a share of the timesteps. Source: IF's inference code.
AUG_LEVEL = 0.25


def make_net(config: UNetConfig, recompute: str = "none", layout: str = "nchw") -> UNet:
    """The net of the config: a UNet, or a SuperResolutionUNet where there is a model.low_res_size."""
    return (SuperResolutionUNet if config.low_res_size else UNet)(config, recompute, layout)


def enlarge(low_res: Tensor, size: int) -> Tensor:
    """The small images in the size of the large ones, so that a pixel of a corner stays in its corner.

    low_res: [N, C, h, w] -> [N, C, size, size].
    """
    return F.interpolate(low_res, (size, size), mode="bilinear", align_corners=True)


def augment(diffusion: Diffusion, low_res: Tensor, aug_t: Tensor, noise: Tensor) -> Tensor:
    """The small images as the net takes them: enlarged to the size of the noise, then noised.

    Shapes: low_res [N, C, h, w] in [-1, 1]; aug_t [N] int64 in [0, T); noise and the result [N, C, H, W].
    """
    return diffusion.q_sample(enlarge(low_res, noise.shape[-1]), aug_t, noise)


def augment_at(diffusion: Diffusion, low_res: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """low_res and aug_t as the net takes them, of all small images at one level, a share of the timesteps in [0, 1)."""
    aug_t = torch.full((len(noise),), int(level * diffusion.timesteps), device=noise.device)
    return augment(diffusion, low_res, aug_t, noise), aug_t


class SuperResolutionUNet(UNet):
    """A UNet that also sees the small image, and is told how much noise was added to that one.

    The noise, which a training draws anew for each image, keeps the net from trusting what the first stage drew.
    low_res: [N, in_channels, H, W], the small images as augment makes them; aug_t: [N], its timesteps, of the same
    diffusion; the rest is as for UNet.
    Raises: ValueError, as UNet, and for a low_res that is not like x or an aug_t that is not like timesteps.
    Source: DeepFloyd IF's SuperResUNetModel; Ho et al. 2021 (Cascaded Diffusion Models), section 4.2.
    """

    outside_stages = (*UNet.outside_stages, "_embed_augmentation")

    def __init__(self, config: UNetConfig, recompute: str = "none", layout: str = "nchw") -> None:
        super().__init__(config, recompute, layout)
        emb = config.time_embed_dim
        self.aug_proj = nn.Sequential(
            nn.Linear(config.model_channels, emb), make_activation(config.activation), nn.Linear(emb, emb)
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, text_emb: Tensor | TextState, low_res: Tensor, aug_t: Tensor
    ) -> Tensor:
        if low_res.shape != x.shape:
            raise ValueError(
                f"low_res is {list(low_res.shape)} and x {list(x.shape)}: enlarge low_res with "
                "model.super_resolution.enlarge, and give one for each image"
            )
        if (aug_t.shape, aug_t.dtype) != (timesteps.shape, timesteps.dtype):
            raise ValueError(
                f"aug_t is {list(aug_t.shape)} of {aug_t.dtype}, timesteps are {list(timesteps.shape)} of "
                f"{timesteps.dtype}: give one of the same kind for each image"
            )
        text = text_emb if isinstance(text_emb, TextState) else self.encode_text(text_emb)
        self._check_input(x, timesteps, text)
        text = text._replace(pooled=text.pooled + self._embed_augmentation(aug_t))
        return self._denoise(torch.cat([x, low_res], dim=1), timesteps, text)

    def _embed_augmentation(self, aug_t: Tensor) -> Tensor:
        return self.aug_proj(timestep_embedding(aug_t, self.config.model_channels).to(self.dtype))
