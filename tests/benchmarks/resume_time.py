"""How long the first batch takes, by how far the epoch has gone: `python -m tests.benchmarks.resume_time work=SCRATCH`.

Shards of 10,000 small JPEGs with embeddings of 8 KB, read without workers; the files are in the page cache.
"""

import io
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.cli import command, location
from data.config import DataConfig
from data.loader.dataset import find_datasets
from data.loader.stream import MicroBatches, micro_batches
from data.storage.tars import write_shard
from data.text.embeddings import to_bytes
from data.text.meta import EMPTY, TextMeta

TOKENS, DIM, BATCH = 4, 1024, 64


@dataclass
class ResumeTime:
    """Measures how long the first batch takes after a resume.

    work: a scratch folder for the shards.
    shards: number of shards.
    shard_size: samples in a shard.
    repeats: resumes at each place of the epoch.
    """

    work: str = location()
    shards: int = 4
    shard_size: int = 10_000
    repeats: int = 5


def write(args: ResumeTime, folder: Path) -> None:
    """Each sample has the bytes of one picture and one embedding; only where they lie matters here."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    row = to_bytes(np.zeros((TOKENS, DIM), np.float16))
    for shard in range(args.shards):
        keys = [f"{shard:05d}{n:06d}" for n in range(args.shard_size)]
        write_shard(folder / f"{shard:05d}.tar", [(k, {"jpg": buffer.getvalue(), "txt": b"a caption"}) for k in keys])
        write_shard(folder / "text" / f"{shard:05d}.tar", [(k, {"npy": row}) for k in keys])
    (folder / "text" / EMPTY).write_bytes(row)
    TextMeta("none", "0", "0", TOKENS, DIM, "float16", "float32", "none").write(folder / "text")


def first_batch(folder: str, step: int) -> float:
    """Seconds from the start of the loader to its first batch."""
    config = DataConfig(shards=folder, text=f"{folder}/text", tokens=TOKENS, streams=1, phases=1)
    datasets, meta = find_datasets(config), TextMeta.read(config.text)
    began = time.perf_counter()
    stream = MicroBatches(
        config, datasets, meta, image_size=64, seed=0, global_batch=BATCH, micro_batch=BATCH, step=step
    )  # fmt: skip
    next(iter(micro_batches(stream, 0, pin_memory=False)))
    return time.perf_counter() - began


def measure(args: ResumeTime) -> None:
    """Print the table."""
    folder = Path(args.work) / f"resume{args.shards}x{args.shard_size}"
    if not folder.exists():
        write(args, folder)
    steps = args.shards * args.shard_size // BATCH
    print("| place in the epoch | step | seconds to the first batch |\n|---|---|---|")
    for share in (0, 0.1, 0.25, 0.45, 0.5, 0.75, 0.99, 7.6):
        seconds = []
        seconds = [first_batch(str(folder), int(share * steps)) for _ in range(args.repeats)]
        print(f"| {share:.0%} | {int(share * steps)} | {statistics.median(seconds):.3f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, ResumeTime, argv)


if __name__ == "__main__":
    main()
