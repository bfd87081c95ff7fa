"""The timestep and the noise of each sample, drawn by its visit: they are the same on any number of ranks."""

import numpy as np
import torch
from torch import Tensor

from data.loader.draws import Draw, generator


def draw_t_and_noise(seed: int, visit: Tensor, x_start: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """t, uniform in [0, timesteps), and Gaussian noise, drawn on the CPU and moved to the device of x_start.

    Shapes: visit [N] int64; x_start [N, 3, H, W]; t [N] int64; noise [N, 3, H, W] float32.
    """
    visits = visit.tolist()
    t = [int(generator(seed, Draw.TIMESTEP, v).integers(timesteps)) for v in visits]
    shape = tuple(x_start.shape[1:])
    noise = [generator(seed, Draw.NOISE, v).standard_normal(shape, dtype=np.float32) for v in visits]
    return torch.tensor(t).to(x_start.device), torch.from_numpy(np.stack(noise)).to(x_start.device)
