"""t and the noise of each sample, keyed by its visit, so that they are the same on any number of ranks."""

import numpy as np
import torch
from torch import Tensor

from data.loader.draws import Draw, generator


def draw_t_and_noise(seed: int, visit: Tensor, shape: torch.Size, timesteps: int) -> tuple[Tensor, Tensor]:
    """t uniform in [0, T) and Gaussian noise.

    Shapes: visit [N] int64; shape (N, 3, H, W); t [N] int64; noise [N, 3, H, W] float32, both on the CPU.
    """
    visits = visit.tolist()
    t = [int(generator(seed, Draw.TIMESTEP, v).integers(timesteps)) for v in visits]
    noise = [generator(seed, Draw.NOISE, v).standard_normal(tuple(shape[1:]), dtype=np.float32) for v in visits]
    return torch.tensor(t), torch.from_numpy(np.stack(noise))
