"""A training step never waits for the device: on the meta device, which has no numbers to read, it runs to its end."""

import pytest
import torch

from model.config import RECOMPUTE, UNetConfig
from model.diffusion import Diffusion
from model.losses import training_losses
from model.unet import UNet


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("out_channels", [3, 6])
def test_forward_loss_and_backward_read_no_number(recompute, out_channels):
    config = UNetConfig(
        image_size=16, model_channels=64, channel_mult=[1, 2], attention_resolutions=[8], encoder_dim=64,
        encoder_channels=64, activation="gelu_3bit", out_channels=out_channels,
    )  # fmt: skip
    with torch.device("meta"):
        unet, diffusion = UNet(config, recompute).bfloat16(), Diffusion(1000)
        x_start, noise, text_emb = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, 77, 64).half()
        t, weight = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    diffusion.to("meta")
    x_t = diffusion.q_sample(x_start, t, noise)
    losses = training_losses(diffusion, unet(x_t, t, text_emb), x_start, x_t, t, noise)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    loss = (losses["loss"] * weight).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in unet.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()
