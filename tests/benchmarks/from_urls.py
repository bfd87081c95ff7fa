"""From a table of addresses and captions to a training: seconds and bytes of img2dataset and of the commands after it.

python -m tests.benchmarks.from_urls img2dataset=ENVIRONMENT/bin/img2dataset out=FOLDER photos=FOLDER_OF_JPEGS
    The web server is on this machine and takes some of its cores, so img2dataset's rate is that of the cores, without
    what a real network costs.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.checks import check_absent
from data.cli import command, location
from data.storage.shards import find_shards
from tests.support.picture_web import img2dataset_arguments, serve, status_counts, write_table, write_web
from tests.support.trainings import SMALL


@dataclass
class FromUrls:
    """Measures the way from addresses to a training on a web server of this machine.

    img2dataset: the command of an environment that has img2dataset.
    out: a folder that does not exist yet.
    photos: a folder of large JPEGs to cut the pictures from; drawn scenes by default.
    pictures: addresses in the table; a fifth of them brings nothing that can be used.
    processes: processes of img2dataset.
    threads: threads of each.
    image_size: pixels of the short side, as img2dataset writes it.
    quality: of the JPEGs.
    steps: of the training; with 0 only img2dataset runs.
    """

    img2dataset: str = location()
    out: str = location()
    photos: str = location("")
    pictures: int = 1000
    processes: int = 2
    threads: int = 32
    image_size: int = 256
    quality: int = 95
    steps: int = 3


def measure(args: FromUrls) -> None:
    """Print the table. Raises: SystemExit with the end of what a command said if it fails."""
    check_absent("out", args.out)
    out = Path(args.out).absolute()
    shards, text, encoder = out / "shards", out / "text", out / "t5"
    www = write_web(out, args.pictures, Path(args.photos) if args.photos else None)
    with serve(www) as url:
        write_table(out / "urls.parquet", url, args.pictures)
        download = img2dataset_arguments(
            out / "urls.parquet", shards, processes_count=args.processes, thread_count=args.threads,
            number_sample_per_shard=250, image_size=args.image_size,
            encode_quality=args.quality,
        )  # fmt: skip
        seconds = {"img2dataset": run(args.img2dataset, *download)}
    seconds["the same, from the first request to the last shard"] = duration(shards)
    if args.steps:
        seconds |= train(shards, text, encoder, out / "run", args.steps)
    report(args, shards, text, seconds)


def train(shards: Path, text: Path, encoder: Path, run_dir: Path, steps: int) -> dict[str, float]:
    """The seconds of the commands from shards to a training."""
    seconds, python = {}, (sys.executable, "-m")
    seconds["data.index"] = run(*python, "data.index", f"shards={shards}")
    run(*python, "data.tiny_t5", f"out={encoder}")
    seconds["data.embed, a tiny T5, 77 tokens"] = run(
        *python, "data.embed", f"shards={shards}", f"out={text}", f"encoder={encoder}"
    )
    training = (sys.executable, "train/main.py", *(a for a in SMALL if not a.startswith("steps=")))
    training += (f"steps={steps}", f"data.shards={shards}", f"data.text={text}", f"run_dir={run_dir}")
    seconds["dry run"] = run(*training, "dry_run=true")
    seconds[f"{steps} steps of a small net"] = run(*training)
    return seconds


def run(*arguments: str) -> float:
    """Run a command; how many seconds it took."""
    began = time.perf_counter()
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(arguments, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - began


def duration(shards: Path) -> float:
    """Seconds from the begin of the first shard to the end of the last."""
    stats = [json.loads(path.read_text()) for path in shards.glob("*_stats.json")]
    return max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)


def report(args: FromUrls, shards: Path, text: Path, seconds: dict[str, float]) -> None:
    """Print what came of the addresses, the seconds of each command, and the bytes of a pair."""
    pairs = sum(shard.count for shard in find_shards(shards))
    print(f"{args.pictures} addresses, {pairs} pairs: " + ", ".join(f"{n} {s}" for s, n in status_counts(shards)))
    print("| command | seconds | pairs/s |\n|---|---:|---:|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken:.1f} | {pairs / taken:,.0f} |")
    size: Counter[str] = Counter()
    for folder, what in ((shards, "shards"), (text, "embeddings")):
        for path in folder.iterdir() if folder.exists() else ():
            size[f"{what}, {'*.tar' if path.suffix == '.tar' else path.suffix}"] += path.stat().st_size
    for path in (shards.parent / "www").iterdir():
        size["what the server sent"] += path.stat().st_size
    print("| bytes of a pair | |\n|---|---:|")
    for what, total in sorted(size.items()):
        print(f"| {what} | {total / pairs:,.0f} |")


def main(argv: list[str] | None = None) -> None:
    command(measure, FromUrls, argv)


if __name__ == "__main__":
    main()
