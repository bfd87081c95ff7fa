"""Pictures that a net has never seen the like of: at 16 px, each pixel black beside white."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data.loader.batch import Batch
from data.loader.stream import MicroBatches


def checkerboard(size: int = 16) -> np.ndarray:
    """[size, size, 3] uint8, each pixel 0 or 255, and another than its neighbours."""
    places = np.arange(size)
    return np.repeat(((places[:, None] + places) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


def draw_over(shards: Path, names: Iterable[str]) -> None:
    """Write a checkerboard over the pictures of samples, SHARD:KEY, in their tars; all else stays as it is."""
    jpeg = io.BytesIO()
    Image.fromarray(checkerboard()).save(jpeg, "JPEG", quality=100, subsampling=0)
    for name in names:
        shard, key = name.split(":")
        with tarfile.open(shards / shard) as tar:
            member = tar.getmember(f"{key}.jpg")
        assert member.size >= len(jpeg.getvalue())
        with open(shards / shard, "r+b") as file:
            file.seek(member.offset_data)
            file.write(jpeg.getvalue().ljust(member.size, b"\0"))


def spoil(batch: int) -> None:
    """Have all loaders of this process give checkerboards for one global batch of the order."""
    fill = MicroBatches.fill

    def filled(stream: MicroBatches, first: int, stride: int, buffers: list[Batch]):
        for place, buffer in enumerate(fill(stream, first, stride, buffers)):
            if stream.batch_of(first + place * stride) == batch:
                buffer.pixels.numpy()[:] = checkerboard(buffer.pixels.shape[-1]).transpose(2, 0, 1)
            yield buffer

    MicroBatches.fill = filled
