"""data.embed against its bare encoder, stored embeddings against the page cache.

    python -m tests.benchmarks.text_speed

The encoder has the width and depth of T5-v1.1-small with random weights, so that a caption costs what it costs there.
Both sides of a ratio are timed in turns, in one process; medians. All is done by the processor, whose clock counts
(both of its modes, all threads), so that others on the machine matter little; embedding by the wall's too. Memory: the
peak of data.embed as a process of its own, over shards of two sizes. Error: of the states of that encoder, by storage
dtype. Needs no network; minutes.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from data.cli import command
from data.storage.claims import claim
from data.storage.locations import open_location
from data.storage.shards import Shard, find_shards
from data.storage.tars import ShardReader, write_shard
from data.text.embeddings import encode_states, from_bytes, read_into, to_bytes
from data.text.encoder import TextEncoder
from data.text.meta import STORED, TextMeta
from data.text.sidecars import write_sidecar
from data.tiny_t5 import TinyT5, write_tiny_t5

CAPTIONS, BATCH, ROUNDS = 128, 32, 5
TOKENS, WIDTH = 77, 4096
STORED_CAPTIONS = {"float32": 100, "float16": 200, "bfloat16": 200, "int8": 400}


def write_encoder(out: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=512, d_kv=64, num_heads=6, d_ff=1024, num_layers=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def write_captions(folder: Path, shards: int, each: int) -> list[Shard]:
    for shard in range(shards):
        rows = [
            (f"{shard:03d}{n:05d}", {"txt": f"A photo of {n} cats, on a <b>table</b> - www.cats.com/{n}".encode()})
            for n in range(each)
        ]
        write_shard(folder / f"{shard:05d}.tar", rows)
    return find_shards(folder)


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the rounds' ratios, theirs to ours."""
    ours(), theirs()
    pairs = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(ROUNDS)]
    mine, bare = ([pair[i] for pair in pairs] for i in range(2))
    return statistics.median(mine), statistics.median(bare), statistics.median(b / a for a, b in pairs)


def embedding(folder: Path) -> TextEncoder:
    encoder = TextEncoder(str(write_encoder(folder / "t5")), TOKENS, "float32", torch.device("cpu"))
    (shard,) = write_captions(folder / "captions", 1, CAPTIONS)
    ids = torch.from_numpy(encoder.token_ids([f"A photo of {n} cats" for n in range(CAPTIONS)])).split(BATCH)
    out, meta = folder / "text", encoder.meta("float16")
    out.mkdir()

    def ours() -> None:
        held = claim(out / shard.name)
        assert held
        with held:
            write_sidecar(shard, str(out), encoder, meta, BATCH, held, lambda n: None)

    def bare() -> None:
        for batch in ids:
            encoder.states(batch)

    # By the processor's clock too, with one thread: what it would be if nothing ran side by side, whoever else is busy.
    threads = torch.get_num_threads()
    for clock, what, using in ((time.process_time, "processor", 1), (time.perf_counter, "wall", threads)):
        torch.set_num_threads(using)
        mine, theirs, ratio = in_turns(ours, bare, clock)
        print(
            f"by the {what} clock: data.embed {CAPTIONS / mine:.1f} captions/s, bare encoder {CAPTIONS / theirs:.1f}, "
            f"ratio {ratio:.3f}", flush=True,
        )  # fmt: skip
    return encoder


def reading(folder: Path) -> None:
    for dtype, captions in STORED_CAPTIONS.items():
        meta = TextMeta("random", "0", "0", TOKENS, WIDTH, dtype, "float32", "none")
        states = np.random.default_rng(0).standard_normal((TOKENS, WIDTH), np.float32)
        data = to_bytes(encode_states(states, dtype))
        path = folder / f"{dtype}.tar"
        write_shard(path, [(f"{n:05d}", {"npy": data}) for n in range(captions)])
        out, buffer = np.empty(meta.shape, meta.array_dtype), bytearray(1 << 20)

        def ours(path: Path = path, out: np.ndarray = out, meta: TextMeta = meta) -> None:
            with open_location(str(path)) as file:
                reader = ShardReader(file, {"npy"}, spans=True)
                while (sample := reader.sample()) is not None:
                    read_into(out, sample[1]["npy"], meta)

        def bare(path: Path = path, buffer: bytearray = buffer) -> None:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        mine, theirs, ratio = in_turns(ours, bare, time.process_time)
        size = path.stat().st_size
        print(
            f"{dtype:>8}: read {size / mine / 1e9:.2f} GB/s, page cache {size / theirs / 1e9:.2f}, ratio {ratio:.2f}; "
            f"{captions / mine:.0f} captions/s, {meta.nbytes:,} bytes each",
            flush=True,
        )
        path.unlink()


def error(encoder: TextEncoder) -> None:
    states = encoder([f"a photo of {n} cats beside the {n + 1} dogs" for n in range(16)]).reshape(-1, encoder.dim)
    spiked = states.copy()
    spiked[:, 7] *= 30
    for what, exact in (("as they are", states), ("one channel 30 times as large", spiked)):
        others = np.arange(encoder.dim) != 7
        for dtype in STORED:
            meta = TextMeta("random", "0", "0", len(exact), encoder.dim, dtype, "float32", "none")
            off = (from_bytes(to_bytes(encode_states(exact, dtype)), meta).astype(np.float32) - exact)[:, others]
            print(f"{what}: {dtype:>8} rms error / rms {np.sqrt((off**2).mean() / (exact[:, others] ** 2).mean()):.1e}")


def memory(folder: Path) -> None:
    write_tiny_t5(TinyT5(out=str(folder / "wide"), dim=1024, layers=1))
    peaks = []
    for each in (100, 1600):
        write_captions(folder / f"of-{each}", 1, each)
        told = f"shards={folder}/of-{each} out={folder}/text-{each} encoder={folder}/wide dtype=float32 compute=float32"
        code = (
            "import resource, sys; from data.embed import Embed, embed; from data.cli import parse\n"
            "embed(parse(Embed, sys.argv[1:])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code, *told.split()], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    shard = 1600 * TOKENS * 1024 * 4 / 2**20
    print(
        f"peak memory of data.embed: {peaks[0]:.0f} MiB for a shard of 100 captions, {peaks[1]:.0f} MiB for one of "
        f"1600, whose embeddings take {shard:.0f} MiB"
    )


@dataclass
class TextSpeed:
    """Measures data.embed against its bare encoder, and the reading of embeddings against the page cache."""


def measure(_: TextSpeed) -> None:
    """Print all figures."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = embedding(folder)
        reading(folder)
        error(encoder)
        memory(folder)
    print(f"peak memory of this benchmark: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def main(argv: list[str] | None = None) -> None:
    command(measure, TextSpeed, argv)


if __name__ == "__main__":
    main()
