"""A training does not wait for the device but in DeepSpeed's check of the gradient, once a step.

The net runs to its end on the meta device, which has no numbers to read. The whole loop is counted in real trainings.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from data.text.encoder import TextEncoder
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import RECOMPUTE, UNetConfig
from model.diffusion import Diffusion
from model.losses import training_losses
from model.super_resolution import augment, make_net
from tests.support.counted_waits import ACCUMULATE, MICRO_BATCH, STEPS
from tests.support.trainings import make_data


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("out_channels, low_res_size", [(3, 0), (6, 0), (6, 4)])
def test_forward_loss_and_backward_read_no_number(recompute, out_channels, low_res_size):
    config = UNetConfig(
        image_size=16, model_channels=64, channel_mult=[1, 2], attention_resolutions=[8], encoder_dim=64,
        encoder_channels=64, activation="gelu_3bit", out_channels=out_channels,
        low_res_size=low_res_size,
    )  # fmt: skip
    with torch.device("meta"):
        unet, diffusion = make_net(config, recompute).bfloat16(), Diffusion(1000)
        x_start, noise, text_emb = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, 77, 64).half()
        t, weight = torch.zeros(2, dtype=torch.int64), torch.ones(2)
        low_res = (augment(diffusion, torch.randn(2, 3, 4, 4), t, noise), t) if low_res_size else ()
    diffusion.to("meta")
    x_t = diffusion.q_sample(x_start, t, noise)
    losses = training_losses(diffusion, unet(x_t, t, text_emb, *low_res), x_start, x_t, t, noise)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    loss = (losses["loss"] * weight).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in unet.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_the_text_encoder_reads_no_number(tmp_path):
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5")))
    encoder = TextEncoder(str(tmp_path / "t5"), 16, "bfloat16", torch.device("cpu"))
    ids = torch.from_numpy(encoder.token_ids(["a red circle", ""]))
    encoder.to(torch.device("meta"))
    assert encoder.states(ids).shape == (2, 16, encoder.dim)


@pytest.fixture(scope="module")
def counted(repo, tmp_path_factory) -> dict[str, dict]:
    """What each way to train counts."""
    folder = tmp_path_factory.mktemp("counted")
    out = folder / "counted"
    command = [sys.executable, "-m", "tests.support.counted_waits", str(make_data(folder / "data")), str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


# What is on the host anyway: the draws of t and noise, and what the ranks answered one another.
ON_HOST = {
    "read: train/noise.py draw_t_and_noise": ACCUMULATE * (1 + 2 * MICRO_BATCH),
    "read: train/noise.py send": 2 * ACCUMULATE,  # how many samples lack a caption, and how many are enlarged
    "read: train/faults/preempt.py answer": 2,  # what they ask one another, and the loss and norm of an earlier step
}
# DeepSpeed looks for values that are not finite, then at the norm, and at the norm once more before it clips.
OVERFLOW_CHECK = {"read: zero/stage_1_and_2.py has_overflow": 1, "read: runtime/utils.py is_invalid_grad_norm": 2}
# Pixels, text, weight, t and noise; and to the host the step's loss and norm, which are read two steps later.
COPIES = {"copy: train/noise.py send": 5 * ACCUMULATE, "copy: train/faults/spikes.py add": 1}
A_STEP = ON_HOST | OVERFLOW_CHECK | COPIES


def test_the_loop_waits_in_the_check_of_the_gradient_alone(counted):
    found = counted["as it is"]
    # The first two steps have none to judge.
    # The first one makes the optimizer's state, and sends a micro batch more; the last one sends one less.
    assert found["steps"][2:-1] == [A_STEP] * (STEPS - 3)
    # The next micro batch is sent before the engine's step, in which the host waits; none is loaded beyond the end.
    assert found["order"] == ["send", *["send", "step"] * (STEPS * ACCUMULATE - 1), "step"]


def test_the_small_images_of_the_second_stage_make_it_wait_no_more(counted):
    drawn = {"read: train/noise.py draw_t_and_noise": ACCUMULATE * (1 + 2 * MICRO_BATCH)}
    sent = {"copy: train/noise.py _send_low_res": 3 * ACCUMULATE}  # the small images, their timesteps and noise
    expected = Counter(A_STEP) + Counter(drawn) + Counter(sent)
    assert counted["the second stage"]["steps"][2:-1] == [expected] * (STEPS - 3)


def test_what_would_make_the_loop_wait_is_counted(counted):
    read = {"read: train/loop.py train": ACCUMULATE}
    assert counted["a number read"]["steps"][2:-1] == [A_STEP | read] * (STEPS - 3)
    timer = {f"synchronize: utils/timer.py {place}": ACCUMULATE for place in ("start", "stop")}
    assert counted["the timer"]["steps"][-2] == A_STEP | timer
