"""The micro batches on the device, each sample with its timestep and its noise; the next one is sent ahead."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.loader.batch import Batch
from data.loader.draws import Draw, generator
from model.diffusion import Diffusion
from model.super_resolution import augment

# The purposes of the draws of t and noise: of the images, and of the small images of the second stage.
OF_IMAGES, OF_LOW_RES = (Draw.TIMESTEP, Draw.NOISE), (Draw.AUGMENTATION, Draw.AUGMENTATION_NOISE)


@dataclass(slots=True)
class DeviceBatch:
    """A micro batch of N samples on the device.

    Shapes: x_start [N, 3, H, W] float32 in [-1, 1]; text_emb and weight as in Batch; t [N] int64; noise as x_start.
    bad: (sample, reason) for each weight of 0.  lacks: how many samples lack one of several captions.
    enlarged: how many were cropped from fewer pixels than the net sees.
    loaded: what it was made of, on the host.
    low_res: of the second stage, low_res and aug_t as its net takes them; () in the first.
    """

    x_start: Tensor
    text_emb: Tensor
    weight: Tensor
    t: Tensor
    noise: Tensor
    bad: list[tuple[str, str]]
    lacks: int = 0
    enlarged: int = 0
    loaded: Batch | None = None
    low_res: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x_start, self.text_emb, self.weight, self.t, self.noise, *self.low_res


class DeviceBatches:
    """The loader's micro batches, in its order, on the device with their t and noise.

    The host waits for the device once a step. What it draws and copies after that keeps the device waiting, so the loop
    calls prefetch() before it. The copies leave page-locked memory in a stream of their own, beside the backward.
    diffusion: on the device; t is uniform in its timesteps.
    """

    def __init__(self, batches: Iterator[Batch], seed: int, diffusion: Diffusion, device: torch.device) -> None:
        self._batches, self._seed, self._diffusion, self._device = batches, seed, diffusion, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: DeviceBatch | None = None
        self._error: Exception | None = None

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> DeviceBatch:
        self.prefetch()
        batch, self._next = self._next, None
        if batch is None:
            raise self._error or StopIteration
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in batch.tensors:
                # They were allocated in the other stream, which would take their memory back before this one is done.
                tensor.record_stream(current)
        return batch

    def prefetch(self) -> None:
        """Load, draw and send the next micro batch, unless it is sent already or there is none.

        An error of the loader is raised by next(), after the step that is being made.
        """
        if self._next or self._error:
            return
        try:
            batch = next(self._batches, None)
        except Exception as error:
            self._error = error
            return
        if batch:
            # Without a stream not even torch.cuda.stream(None): it would take memory of a GPU that is not used.
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._next = self.send(batch)

    def send(self, batch: Batch) -> DeviceBatch:
        """A micro batch on the device, with the t and noise of its samples."""
        t, noise = self._draw(batch, *OF_IMAGES)
        pixels, text_emb, weight, t, noise = (
            tensor.to(self._device, non_blocking=True)
            for tensor in (batch.pixels, batch.text_emb, batch.weight, t, noise)
        )
        x_start, low_res = pixels.float() / 127.5 - 1.0, self._send_low_res(batch)
        lacks, enlarged = int(batch.lacks), int(batch.enlarged)
        return DeviceBatch(x_start, text_emb, weight, t, noise, batch.bad, lacks, enlarged, batch, low_res)

    def _send_low_res(self, batch: Batch) -> tuple[Tensor, ...]:
        """The small images of the second stage, sent before they are enlarged, and how much each is noised."""
        if batch.low_res is None:
            return ()
        low_res, aug_t, noise = (
            tensor.to(self._device, non_blocking=True) for tensor in (batch.low_res, *self._draw(batch, *OF_LOW_RES))
        )
        return augment(self._diffusion, low_res.float() / 127.5 - 1.0, aug_t, noise), aug_t

    def _draw(self, batch: Batch, timestep: Draw, noise: Draw) -> tuple[Tensor, Tensor]:
        shape, timesteps = tuple(batch.pixels.shape[1:]), self._diffusion.timesteps
        return draw_t_and_noise(self._seed, batch.visit, shape, timesteps, self._stream is not None, timestep, noise)


def draw_t_and_noise(
    seed: int, visit: Tensor, shape: tuple[int, ...], timesteps: int, pin_memory: bool = False,
    of_t: Draw = Draw.TIMESTEP, of_noise: Draw = Draw.NOISE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """t, uniform in [0, timesteps), and Gaussian noise, drawn by each sample's visit: the same on any number of ranks.

    Shapes: visit [N] int64; t [N] int64; noise [N, *shape] float32. All on the host, page-locked if pin_memory.
    of_t, of_noise: the purposes of the draws.
    """
    t = torch.empty(len(visit), dtype=torch.int64, pin_memory=pin_memory)
    noise = torch.empty((len(visit), *shape), pin_memory=pin_memory)
    for i, v in enumerate(visit.tolist()):
        t.numpy()[i] = generator(seed, of_t, v).integers(timesteps)
        generator(seed, of_noise, v).standard_normal(dtype=np.float32, out=noise.numpy()[i])
    return t, noise
