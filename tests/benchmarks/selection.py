"""What it costs to choose samples: rows/s of the rules, bytes of a selection, and the loader's speed with half chosen.

    python -m tests.benchmarks.selection pictures=FOLDER_OF_SHARDS work=SCRATCH

Prints markdown tables. Rates are of one core, by the time that the process had on it, since other programs may share
the machine; what is compared takes turns, and each figure is a median of the rounds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.cli import command, location
from data.config import DataConfig
from data.loader.dataset import Dataset
from data.loader.stream import MicroBatches, micro_batches
from data.selection.choose import Plan, choose, look_at_fields, make_plan
from data.selection.rules import Rules
from data.selection.stored import Chosen, read_selection, write_selection
from data.storage.shards import Shard, find_shards
from data.storage.tars import write_shard
from data.text.meta import TextMeta
from tests.benchmarks.loader_speed import IMAGE_SIZE, write_embeddings

WHERE = "similarity >= 0.28 and punsafe < 0.5 and pwatermark < 0.5 and min(width, height) >= 64 and len(caption) >= 5"
# LAION-2B-en as it is trained on: rows, shards of img2dataset's default size, and cores of a node.
ALL_ROWS, PER_SHARD, CORES = 1_200_000_000, 10_000, 64


@dataclass
class SelectionCost:
    """Measures the choosing of samples, and the loading of those that are chosen.

    work: a scratch folder.
    pictures: a folder of shards, for the loader.
    rows: samples of the shard that the rules are applied to.
    image_bytes: of each of its pictures.
    listed: URLs in the list of data.drop.
    rounds: turns of each.
    micro_batch: samples of one.
    """

    work: str = location()
    pictures: str = location()
    rows: int = 10_000
    image_bytes: int = 10_000
    listed: int = 1_000_000
    rounds: int = 5
    micro_batch: int = 8


def facts(n: int, random: np.random.Generator) -> dict:
    """The fields of a sample as img2dataset writes them, with LAION's scores."""
    return {
        "caption": f"a photograph of something that is described in some words, number {n}",
        "url": f"https://pictures.example/{n}/a-photograph.jpg", "key": f"{n:09d}", "status": "success",
        "error_message": None, "width": 256, "height": 256, "original_width": 800, "original_height": 600,
        "exif": "{}", "sha256": f"{n:064x}", "similarity": random.uniform(0.2, 0.4), "punsafe": random.random() ** 3,
        "pwatermark": random.random(),
    }  # fmt: skip


def write_shards(work: Path, rows: int, image_bytes: int) -> dict[str, Shard]:
    """The same samples in three forms."""
    random, image = np.random.default_rng(0), os.urandom(image_bytes)
    records = [facts(n, random) for n in range(rows)]
    samples = [
        (r["key"], {"jpg": image, "json": json.dumps(r, indent=4).encode(), "txt": r["caption"].encode()})
        for r in records
    ]
    forms = {"KEY.json in the tar": None, "parquet in the tar's order": records, "parquet in another": records[::-1]}
    shards = {}
    for number, (name, table) in enumerate(forms.items()):
        folder = work / f"form{number}"
        write_shard(folder / "00000.tar", samples)
        if table:
            pq.write_table(pa.Table.from_pylist(table), folder / "00000.parquet")
        shards[name] = find_shards(folder)[0]
    return shards


def core_seconds(action: Callable[[], object]) -> float:
    """Seconds of a core."""
    began = time.process_time()
    action()
    return time.process_time() - began


def measure_rules(args: SelectionCost, work: Path) -> None:
    """Rows/s of one core, for each form."""
    shards = write_shards(work, args.rows, args.image_bytes)
    listed = work / "removed.parquet"
    urls = [f"https://pictures.example/{n * 7}/a-photograph.jpg" for n in range(args.listed)]
    pq.write_table(pa.table({"url": urls}), listed)
    began = time.process_time()
    plans: dict[str, Plan] = {}
    for name, rules in {"where": Rules(WHERE), "where, drop, share": Rules(WHERE, (str(listed),), 0.001)}.items():
        plans[name] = make_plan(rules, look_at_fields([next(iter(shards.values()))], 1))
    print(f"\nA list of {args.listed:,} URLs is read in {time.process_time() - began:.1f} s.")
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for form, shard in shards.items():
            for name, plan in plans.items():
                took = core_seconds(lambda plan=plan, shard=shard: choose(plan, shard))
                seconds.setdefault((form, name), []).append(took)
    print("\n| fields | rules | rows/s of a core | core seconds for a million | 1.2 billion on 64 cores |")
    print("|---|---|---|---|---|")
    for (form, name), values in seconds.items():
        per_row = statistics.median(values) / args.rows
        minutes = per_row * ALL_ROWS / CORES / 60
        print(f"| {form} | {name} | {1 / per_row:,.0f} | {per_row * 1e6:.1f} | {minutes:.0f} minutes |")


def measure_file(work: Path) -> None:
    """Bytes and memory of a selection of 1.2 billion rows, of which half are chosen at random and 0.1 % held apart."""
    random, count = np.random.default_rng(0), ALL_ROWS // PER_SHARD
    kinds = []
    for _ in range(20):
        draw = random.random(PER_SHARD)
        kinds.append(Chosen.of(draw < 0.5, draw > 0.999, [1, 1], [0, 0]))
    shards = [Shard(f"{n:05d}.tar", PER_SHARD, digest=f"{n:032x}") for n in range(count)]
    path = str(work / "all.safetensors")
    size = write_selection(
        path, "r", ["where x", "validation share 0.001"], shards, [kinds[n % 20] for n in range(count)]
    )
    began = time.perf_counter()
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:  # whose memory is its own
        start = _own_memory()
        selection = read_selection(path, "r", shards, "")
        seconds = time.perf_counter() - began
        read_one = core_seconds(lambda: [selection.rows(n, 0) for n in range(1000)]) / 1000
        arrays = (getattr(selection, name) for name in ("counts", "_samples", "_starts", "_sizes", "_marks"))
        kept = sum(array.nbytes for array in arrays)
        os.write(writer, json.dumps([_own_memory() - start, seconds, read_one, kept]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    memory, seconds, read_one, kept = json.loads(os.read(reader, 1 << 16))
    print("\n| 1.2 billion rows in 120,000 shards, half of them chosen, 0.1 % held apart | |\n|---|---|")
    print(f"| bytes | {size / 1e6:.0f} MB, {size / ALL_ROWS * 1e6 / 1e3:.0f} kB for a million rows |")
    print(f"| read at the start of a training | {seconds:.1f} s |")
    print(f"| memory of the process that reads it | {memory / 1e6:.0f} MB |")
    print(f"| of which stays, and is what the other ranks get and the workers share | {kept / 1e6:.0f} MB |")
    print(f"| the rows of a shard, when it is opened | {read_one * 1e6:.0f} us |")


def _own_memory() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Private_Dirty of this process")


def measure_loader(args: SelectionCost, work: Path) -> None:
    """images/s of a core, in this process, with all samples and with a random half of them."""
    shards = find_shards(args.pictures)
    text = work / "text"
    if not text.exists():
        write_embeddings(shards, text, 4, 8)
    random = np.random.default_rng(0)
    shards = [Shard(s.location, s.count, digest=f"{n:032x}") for n, s in enumerate(shards)]
    half = [random.random(shard.count) < 0.5 for shard in shards]
    path = str(work / "half.safetensors")
    write_selection(path, "r", ["half"], shards, [Chosen.of(m, np.zeros_like(m), [0], [0]) for m in half])
    datasets = {
        "all samples": Dataset(shards, str(text)),
        "half of them": Dataset(shards, str(text), selection=read_selection(path, "r", shards, "")),
    }
    config = DataConfig(shards=args.pictures, text=str(text), streams=1, phases=1, workers=0)
    running = {}
    for name, dataset in datasets.items():
        stream = MicroBatches(
            config, [dataset], TextMeta.read(text), image_size=IMAGE_SIZE, seed=0, global_batch=8 * args.micro_batch,
            micro_batch=args.micro_batch,
        )  # fmt: skip
        running[name] = micro_batches(stream, 0, pin_memory=False)
    rates: dict[str, list[float]] = {name: [] for name in datasets}
    for turn in range(args.rounds + 1):
        for name, batches in running.items():
            count = datasets[name].samples // args.micro_batch
            seconds = core_seconds(lambda b=batches, n=count: [None for _ in islice(b, n)])
            if turn:  # the first epoch fills the page cache
                rates[name].append(count * args.micro_batch / seconds)
    ratios = [half / whole for whole, half in zip(*rates.values(), strict=True)]
    print(
        f"\n{sum(s.count for s in shards):,} pictures of {args.pictures}:\n\n| chosen | images/s of a core | of all |"
    )
    print("|---|---|---|")
    for name, values in rates.items():
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if "half" in name else ""
        print(f"| {name} | {statistics.median(values):.0f} | {ratio} |")


def measure(args: SelectionCost) -> None:
    """Print the tables."""
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    measure_loader(args, work)
    measure_rules(args, work)
    measure_file(work)


if __name__ == "__main__":
    command(measure, SelectionCost)
