"""Count the samples of all shards once: `python -m data.index shards=WHERE [out=FILE.json captions=NAME workers=8]`."""

import json
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.checks import check_at_least, count
from data.cli import command, location
from data.storage.caption_fields import TXT, check_fields
from data.storage.locations import join, split, write_whole
from data.storage.shards import CAPTION_DIGESTS, INDEX, is_folder, locate, read_stats, shard_bytes
from data.storage.tars import DIGEST, scan_shard

# Shards named in a report of one kind of fault.
NAMED = 10


@dataclass
class Index:
    """Writes index.json beside the shards: samples, bytes and digest of each, so that a training need not find them.

    They are those of the stats file if our commands wrote it. The headers and captions of other shards are read.

    shards: the shards, as data.shards of a training.
    out: the .json to write; default: index.json in the folder of the shards. Required where shards is not a folder.
    captions: fields of further captions, as in data.captions of a training, whose digests are recorded too. For these
    the headers and captions of all shards are read.
    workers: number of processes that read.
    check: read all shards' headers and captions, and report where a stats file says something else.
    """

    shards: str = location()
    out: str = location("")
    captions: list[str] = field(default_factory=list)
    workers: int = 8
    check: bool = False


class Entry(NamedTuple):
    """A shard.  size: bytes.  in_stats: samples by its stats file, or as counted where there is none.

    digest: of its txt captions.  caption_digests: of others.
    damage: why it was not counted to its end.  problem: why it could not be counted at all.
    """

    location: str
    samples: int = 0
    size: int = 0
    in_stats: int = 0
    digest: str = ""
    caption_digests: dict[str, str] | None = None
    damage: str = ""
    problem: str = ""

    def line(self, folder: str) -> str:
        """The shard in an index that lies in a folder."""
        facts: dict[str, object] = {"shard": _from(folder, self.location), "samples": self.samples, "bytes": self.size}
        others = {CAPTION_DIGESTS: self.caption_digests} if self.caption_digests else {}
        return json.dumps(facts | {DIGEST: self.digest} | others, ensure_ascii=False)


def index(args: Index) -> None:
    """Count all shards and write the index.

    Raises: ValueError if shards cannot be found or counted; OSError.
    """
    check_at_least("workers", args.workers, 1)
    check_fields("captions", [TXT, *args.captions])
    if args.shards.endswith(".json"):
        raise ValueError(f"shards={args.shards} is an index: name the shards themselves")
    if not args.out and not is_folder(args.shards):
        raise ValueError(f"shards={args.shards} is not a folder: name the file for the index, out=FILE.json")
    out = args.out or join(args.shards, INDEX)
    entries = _count_all(locate(args.shards), args)
    _report("cannot be read", [f"{e.location}: {e.problem}" for e in entries if e.problem])
    _report("with damage; what comes before it is used", [f"{e.location}: {e.damage}" for e in entries if e.damage])
    differ = [
        f"{e.location}: {e.in_stats} by its stats, {e.samples} in the tar" for e in entries if e.in_stats != e.samples
    ]
    _report("with another number of samples than the stats file says; the tar's is taken", differ)
    if any(entry.problem for entry in entries):
        raise ValueError(
            f"not all shards of {args.shards} could be counted, so there is no index: repair or remove them"
        )
    folder = split(out)[0]
    lines = [entry.line(folder) for entry in entries]
    write_whole(out, ('{"shards": [\n' + ",\n".join(lines) + "\n]}\n").encode())
    print(f"{out}: {count(len(entries), 'shard')}, {count(sum(entry.samples for entry in entries), 'sample')}")


def _count_all(locations: list[str], args: Index) -> list[Entry]:
    workers = min(args.workers, len(locations))
    bar = partial(tqdm, total=len(locations), unit="shard", desc="index")
    if workers == 1:
        return [count_shard(location, args.check, args.captions) for location in bar(locations)]
    # Forked: to import everything again would take longer than most counts. Ctrl-C is for the parent alone.
    fork, ignored = get_context("fork"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, fork, initializer=signal.signal, initargs=ignored) as pool:
        try:
            count_one = partial(count_shard, check=args.check, captions=args.captions)
            return list(bar(pool.map(count_one, locations)))
        except BrokenProcessPool:
            raise ValueError(
                f"a worker of data.index died, perhaps out of memory: take fewer than workers={args.workers}"
            ) from None


def count_shard(location: str, check: bool, captions: list[str]) -> Entry:
    """Count a shard: by its stats file if that gives all digests and is not to be checked, else by reading it.

    The digest of a sidecar of embeddings is that of the shard that it embeds.
    """
    try:
        size, stats = shard_bytes(location), read_stats(location)
        if stats and stats.sidecar_size not in (None, size):
            cut = f"it has {size} bytes, {stats.sidecar_size} were written: run data.embed with mode=repair"
            return Entry(location, problem=cut)
        if stats and stats.digest and not check and not captions:
            return Entry(location, stats.samples, size, stats.samples, stats.digest)
        scan = scan_shard(location, [TXT, *captions])
        digest = scan.digests.pop(TXT)
        if stats and stats.sidecar_size is not None:
            digest = stats.digest or ""
        counted = stats.samples if stats else scan.samples
        return Entry(location, scan.samples, size, counted, digest, scan.digests, scan.damage)
    except (OSError, ValueError) as error:
        return Entry(location, problem=str(error))


def _from(folder: str, location: str) -> str:
    """The name of a shard in the index: its file name if it lies beside it, so that both can be moved; else in full."""
    shard_folder, name = split(location)
    if shard_folder == folder:
        return name
    return location if "://" in location else str(Path(location).resolve())


def _report(what: str, lines: list[str]) -> None:
    if lines:
        more = f"\n  and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        print(f"{count(len(lines), 'shard')} {what}:\n  " + "\n  ".join(lines[:NAMED]) + more)


def main(argv: list[str] | None = None) -> None:
    command(index, Index, argv)


if __name__ == "__main__":
    main()
