"""What a low limit of open files costs: a core's time for a sample, with as many files open as are needed and fewer.

    python -m tests.benchmarks.open_files work=SCRATCH

Prints a markdown table. Streams take turns to read a block each, as a loader worker's do; nothing is decoded.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data.cli import command, location
from data.loader.cursor import ShardCursor
from data.storage import local_files
from data.storage.shards import Shard
from data.storage.tars import write_shard

STREAMS, SAMPLES, BLOCK, ROUNDS = 64, 64, 16, 7
IMAGE, EMBEDDING = 50_000, 20_000


@dataclass
class OpenFilesSpeed:
    """Measures the reading of shards and sidecars under several bounds of open files.

    work: a scratch folder; about 300 MB are written to it.
    """

    work: str = location()


def measure(args: OpenFilesSpeed) -> None:
    """Print the table."""
    work = Path(args.work)
    for stream in range(STREAMS):
        keys = [f"{n:05d}" for n in range(SAMPLES)]
        write_shard(work / f"{stream}.tar", [(key, {"jpg": os.urandom(IMAGE), "txt": b"caption"}) for key in keys])
        write_shard(work / "text" / f"{stream}.tar", [(key, {"npy": os.urandom(EMBEDDING)}) for key in keys])
    print(f"| of {2 * STREAMS} files open | us of a core for a sample |\n|---|---|")
    for bound in (2 * STREAMS, STREAMS, 2):
        best = min(_read_all(work, bound) for _ in range(ROUNDS))
        print(f"| {bound} | {best / (STREAMS * SAMPLES) * 1e6:.0f} |")


def _read_all(work: Path, bound: int) -> float:
    local_files.open_files = local_files.OpenFiles(bound)
    start, buffer = time.process_time(), bytearray(EMBEDDING + 200)
    cursors = [ShardCursor(Shard(str(work / f"{n}.tar"), SAMPLES), str(work / "text")) for n in range(STREAMS)]
    for first in range(0, SAMPLES, BLOCK):
        blocks = [[cursor.read(row).embedding for row in range(first, first + BLOCK)] for cursor in cursors]
        for one_of_each in zip(*blocks, strict=True):  # as the samples of a batch
            for span in one_of_each:
                span.read_into(buffer)  # type: ignore[union-attr]
    return time.process_time() - start


if __name__ == "__main__":
    command(measure, OpenFilesSpeed)
