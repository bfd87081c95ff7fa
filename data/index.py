"""Count the samples of all shards once: `python -m data.index shards=WHERE [out=FILE.json workers=8 check=true]`."""

import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from omegaconf import MISSING
from tqdm import tqdm

from data.cli import command
from data.storage.locations import join, split, write_whole
from data.storage.shards import INDEX, is_folder, locate, shard_bytes, stats_count
from data.storage.tars import count_samples

# So many shards are named for each kind of fault.
NAMED = 10


@dataclass
class Index:
    """Writes index.json beside the shards: how many samples and bytes each has, so that no start has to look.

    shards: as data.shards.  out: where to write, needed where shards is not a folder.  workers: processes.
    check: count by the tars' headers also where there is a stats file, and say where the two differ.
    """

    shards: str = MISSING
    out: str = ""
    workers: int = 8
    check: bool = False


class Entry(NamedTuple):
    """What was found out about a shard; problem: why it can't be counted, damage: why not to its end."""

    location: str
    samples: int = 0
    size: int = 0
    said: int = 0
    damage: str = ""
    problem: str = ""


def index(args: Index) -> None:
    """Raises: ValueError if shards can't be found or counted; OSError."""
    if args.workers < 1:
        raise ValueError(f"workers={args.workers} must be at least 1")
    if args.shards.endswith(".json"):
        raise ValueError(f"shards={args.shards} is an index: name the shards themselves")
    if not args.out and not is_folder(args.shards):
        raise ValueError(f"shards={args.shards} is not a folder: say with out=FILE.json where the index shall lie")
    out = args.out or join(args.shards, INDEX)
    entries = _look(locate(args.shards), args)
    _report("cannot be read", [f"{e.location}: {e.problem}" for e in entries if e.problem])
    _report("are damaged; what comes before that is used", [f"{e.location}: {e.damage}" for e in entries if e.damage])
    differ = [f"{e.location}: {e.said} by its stats, {e.samples} in the tar" for e in entries if e.said != e.samples]
    _report("hold another number of samples than their stats file says; the tar's holds", differ)
    if any(entry.problem for entry in entries):
        raise ValueError(f"not all shards of {args.shards} could be counted, so there is no index: mend or remove them")
    folder = split(out)[0]
    lines = [
        json.dumps({"shard": _from(folder, e.location), "samples": e.samples, "bytes": e.size}, ensure_ascii=False)
        for e in entries
    ]
    write_whole(out, ('{"shards": [\n' + ",\n".join(lines) + "\n]}\n").encode())
    print(f"{out}: {len(entries)} shards, {sum(entry.samples for entry in entries):,} samples")


def _look(locations: list[str], args: Index) -> list[Entry]:
    workers = min(args.workers, len(locations))
    bar = partial(tqdm, total=len(locations), unit="shard", desc="index")
    if workers == 1:
        return [look(location, args.check) for location in bar(locations)]
    # Forked, since importing anew would take longer than most counts.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        try:
            return list(bar(pool.map(partial(look, check=args.check), locations)))
        except BrokenProcessPool:
            raise ValueError("a worker of data.index died, perhaps for want of memory: try fewer workers=") from None


def look(location: str, check: bool) -> Entry:
    """Count a shard."""
    try:
        size, said = shard_bytes(location), stats_count(location)
        if said is not None and not check:
            return Entry(location, said, size, said)
        samples, damage = count_samples(location)
        return Entry(location, samples, size, samples if said is None else said, damage)
    except (OSError, ValueError) as error:
        return Entry(location, problem=str(error))


def _from(folder: str, location: str) -> str:
    """A shard beside the index goes by its name, so that both can be moved; another by its whole location."""
    its_folder, name = split(location)
    if its_folder == folder:
        return name
    return location if "://" in location else str(Path(location).resolve())


def _report(what: str, lines: list[str]) -> None:
    if lines:
        more = f"\n  and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        print(f"{len(lines)} shards {what}:\n  " + "\n  ".join(lines[:NAMED]) + more)


if __name__ == "__main__":
    command(index, Index)
