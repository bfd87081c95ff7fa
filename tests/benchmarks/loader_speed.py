"""How fast the loader is: images/s against the bare Pillow loop, a plain webdataset pipeline and open_clip's recipe.

    python -m tests.benchmarks.loader_speed pictures=FOLDER_OF_SHARDS work=SCRATCH [embeddings=true micro_batch=8 ...]
    python -m tests.benchmarks.loader_speed photos=FOLDER_OF_PHOTOGRAPHS side=512 work=SCRATCH

Prints a markdown table. All contenders take turns in every round, on the same JPEGs in the page cache, and the bare
loop runs before and after each: a ratio is to the mean of the two, and each figure a median of the rounds. Where a bare
loop got less than 93 percent of its core, others were using the machine, and the turn is taken again. A turn is one
epoch, so that each block is read once in it; batches that a loader had made in the others' turns don't count.
"""

import io
import random
import statistics
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from data.cli import command, location
from data.config import DataConfig
from data.loader.dataset import find_datasets
from data.loader.stream import MicroBatches, micro_batches
from data.storage.shards import Shard, find_shards
from data.storage.tars import read_shard, write_shard
from data.text.embeddings import to_bytes
from data.text.meta import EMPTY, TextMeta

IMAGE_SIZE = 64
TOKENS, DIM = 77, 4096


@dataclass
class LoaderSpeed:
    """Measures the loader's images/s beside a bare loop and other pipelines.

    work: a scratch folder.
    pictures: a folder of shards.
    photos: a folder of large photographs, in place of pictures; they are cut and written to work.
    side: pixels that photographs are cut to.
    count: photographs to cut.
    embeddings: store float16 embeddings of 77 x 4096 rather than tiny ones.
    micro_batch: samples of one.
    shuffle_block: as data.shuffle_block of a training.
    streams: of a rank, as in conf/experiment/if_i_xl.yaml; there are as many phases as workers.
    opponents: measure webdataset and open_clip's recipe too.
    rounds: turns of each.
    """

    work: str = location()
    pictures: str = location("")
    photos: str = location("")
    side: int = 512
    count: int = 512
    embeddings: bool = False
    micro_batch: int = 8
    shuffle_block: int = 256
    streams: int = 1
    opponents: bool = True
    rounds: int = 5


def cut_photos(source: Path, out: Path, side: int, count: int) -> None:
    """Shards of JPEGs 4:3 or 3:4 with the given shorter side, cut at random places and scales from photographs."""
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(source.rglob("*.jp*g")) if path.is_file() and path.stat().st_size > 100_000]
    large = [
        image
        for image in (Image.open(path).convert("RGB") for path in paths)
        if min(image.size) >= max(1024, side * 4 // 3)
    ]
    samples = []
    for n in range(count):
        image = large[n % len(large)]
        width, height = (side * 4 // 3, side) if n % 2 else (side, side * 4 // 3)
        scale = rng.uniform(1, min(image.width / width, image.height / height))
        w, h = min(int(width * scale), image.width), min(int(height * scale), image.height)
        left, upper = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
        image = image.crop((left, upper, left + w, upper + h)).resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        samples.append(
            (f"{n:09d}", {"jpg": buffer.getvalue(), "txt": b"a photograph", "json": b'{"status": "success"}'})
        )
    for shard in range(0, count, 128):
        write_shard(out / f"{shard // 128:05d}.tar", samples[shard : shard + 128])


def write_embeddings(shards: list[Shard], out: Path, tokens: int, dim: int) -> None:
    """Sidecars of random float16 embeddings."""
    rng = np.random.default_rng(0)
    for shard in shards:
        keys = [key for key, _ in read_shard(shard.location, {"txt"})]
        rows = [rng.standard_normal((tokens, dim), dtype=np.float32).astype(np.float16) for _ in keys]
        write_shard(out / shard.name, [(k, {"npy": to_bytes(row)}) for k, row in zip(keys, rows, strict=True)])
    (out / EMPTY).write_bytes(to_bytes(np.zeros((tokens, dim), np.float16)))
    TextMeta("random", "0", "0", tokens, dim, "float16", "float32", "none").write(out)


def crop_and_resize(image: Image.Image) -> np.ndarray:
    """A shifted centre crop, resized: uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    side = min(image.size)
    left, upper = (
        min(max(round((length - side) / 2 + random.uniform(-0.1, 0.1) * side), 0), length - side)
        for length in image.size
    )
    image = image.crop((left, upper, left + side, upper + side))
    return np.array(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


# What the bare loop works on, in memory before the clock starts; the processes of the pool inherit it.
JPEGS: list[bytes] = []
EMBEDDINGS: list[tuple[str, int]] = []  # file and offset of the numbers


def bare_loop(samples: int, first: int) -> tuple[float, float]:
    """Seconds, and those on a core, for decode -> crop -> resize -> tensor, and for reading the embedding."""
    torch.set_num_threads(1)
    files = {path: open(path, "rb") for path, _ in EMBEDDINGS}  # noqa: SIM115
    began, began_cpu = time.perf_counter(), time.process_time()
    for n in range(first, first + samples):
        image = Image.open(io.BytesIO(JPEGS[n % len(JPEGS)])).convert("RGB")
        torch.from_numpy(crop_and_resize(image)).permute(2, 0, 1)
        if EMBEDDINGS:
            path, offset = EMBEDDINGS[n % len(EMBEDDINGS)]
            files[path].seek(offset)
            torch.from_numpy(np.fromfile(files[path], np.float16, TOKENS * DIM).reshape(TOKENS, DIM))
    return time.perf_counter() - began, time.process_time() - began_cpu


def load_for_bare_loop(shards: list[Shard], text: Path, embeddings: bool) -> None:
    for shard in shards:
        JPEGS.extend(members["jpg"] for _, members in read_shard(shard.location, {"jpg"}))
        if embeddings:
            path = text / shard.name
            with tarfile.open(path) as tar:
                EMBEDDINGS.extend((str(path), m.offset_data + m.size - TOKENS * DIM * 2) for m in tar)


def to_float(image: Image.Image) -> torch.Tensor:
    """As the usual transforms do: a float tensor in [-1, 1] for each sample."""
    return torch.from_numpy(crop_and_resize(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def plain_webdataset(urls: list[str], batch: int, workers: int) -> Iterator:
    """The pipeline of webdataset's own introduction."""
    dataset = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(to_float, lambda text: text)
        .batched(batch)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def open_clip_recipe(urls: list[str], batch: int, workers: int) -> Iterator:
    """The stages of open_clip's training data, in its order, with its buffer of 5,000; the caption isn't tokenized."""
    dataset = wds.DataPipeline(
        wds.ResampledShards(urls),
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.select(lambda sample: "txt" in sample and ("jpg" in sample or "png" in sample)),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=to_float, text=lambda text: torch.zeros(77, dtype=torch.int64)),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0))


def time_loader(batches: Iterator, skip: int, count: int) -> float:
    """Seconds for `count` batches after the first `skip`; one number of each is read, as a step would."""
    for _ in range(skip):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        batch = next(batches)
        (batch.pixels if hasattr(batch, "pixels") else batch[0])[-1, 0, 0, 0].item()
    return time.perf_counter() - began


def memory_mib(pid: int) -> float:
    """A process's own memory: what it shares with nobody, and its part of the rest (Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss of process {pid}")


def bare_rate(pool: ProcessPoolExecutor, processes: int) -> float:
    """images/s of bare loops side by side; 0 if they hadn't the machine for themselves."""
    jobs = [pool.submit(bare_loop, len(JPEGS), n * len(JPEGS) // 2) for n in range(processes)]
    results = [job.result() for job in jobs]
    alone = all(cpu > 0.93 * seconds for seconds, cpu in results)
    return alone * processes * len(JPEGS) / max(seconds for seconds, _ in results)


def contenders(args: LoaderSpeed, folder: Path, text: Path) -> dict[str, tuple[int, Iterator, list[int]]]:
    """Name: workers, batches, the workers' pids."""
    shards, batch = find_shards(folder), args.micro_batch
    data = DataConfig(shards=str(folder), text=str(text), streams=args.streams, shuffle_block=args.shuffle_block)

    def ours(urls: list[str], batch: int, workers: int) -> Iterator:
        config = replace(data, workers=workers, phases=max(workers, 1))
        stream = MicroBatches(
            config, find_datasets(config), TextMeta.read(text), image_size=IMAGE_SIZE, seed=0, global_batch=8 * batch,
            micro_batch=batch,
        )  # fmt: skip
        return micro_batches(stream, workers, pin_memory=False)

    loaders = {"ours": ours}
    if args.opponents:
        loaders |= {"plain webdataset": plain_webdataset, "open_clip's recipe": open_clip_recipe}
    urls = [shard.location for shard in shards]
    found = {}
    for workers in (0, 1, 2):
        for name, make in loaders.items():
            before = set(active_children())
            batches = make(urls, batch, workers)
            next(batches)
            pids = [process.pid for process in set(active_children()) - before if process.pid]
            found[f"{name}, {workers or 'no'} worker{'s' * (workers != 1)}"] = workers, batches, pids
    return found


def measure(args: LoaderSpeed) -> None:
    """Print the table."""
    work, kind = Path(args.work), "embeddings" if args.embeddings else "tiny"
    folder = Path(args.pictures) if args.pictures else work / f"photos{args.side}"
    if not args.pictures and not folder.exists():
        cut_photos(Path(args.photos), folder, args.side, args.count)
    text = work / f"{folder.name}_{kind}"
    if not text.exists():
        write_embeddings(find_shards(folder), text, *((TOKENS, DIM) if args.embeddings else (4, 8)))
    load_for_bare_loop(find_shards(folder), text, args.embeddings)
    pool, count = ProcessPoolExecutor(2), len(JPEGS) // args.micro_batch
    memory: dict[str, float] = {}
    bare_rate(pool, 2)
    running: dict[str, tuple[int, Iterator | None]] = {"two bare loops side by side": (2, None)}
    for name, (workers, batches, pids) in contenders(args, folder, text).items():
        time_loader(batches, 0, count)
        memory[name] = max((memory_mib(pid) for pid in pids), default=0.0)
        running[name] = workers, batches
    bare: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(args.rounds):
        for name, (workers, batches) in running.items():
            for _ in range(5):
                first = bare_rate(pool, 1)
                if batches is None:
                    rate = bare_rate(pool, 2)
                else:
                    rate = count * args.micro_batch / time_loader(batches, 3 * workers + 1, count)
                second = bare_rate(pool, 1)
                if first and second and rate:
                    bare += [first, second]
                    rates[name].append(rate)
                    ratios[name].append(rate / (first + second) * 2 / max(workers, 1))
                    break
    size = np.mean([len(jpeg) for jpeg in JPEGS]) / 1024
    print(f"\n{folder.name}: {len(JPEGS)} JPEGs of {size:.0f} KiB, {args}\n")
    print("| | images/s | lowest to highest | of the bare loop x workers | worker's memory, MiB |")
    print("|---|---|---|---|---|")
    for name, values in {"bare loop": bare, **rates}.items():
        ratio = f"{statistics.median(ratios[name]):.2f}" if ratios.get(name) else ""
        print(
            f"| {name} | {statistics.median(values or [0]):.0f} | {min(values or [0]):.0f} to {max(values or [0]):.0f} "
            f"| {ratio} | {f'{memory[name]:.0f}' if memory.get(name) else ''} |",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    command(measure, LoaderSpeed, argv)


if __name__ == "__main__":
    main()
