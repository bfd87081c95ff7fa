"""Count the samples of all shards once, and choose among them: `python -m data.index shards=WHERE [where=TEXT]`."""

import json
import os
import re
import shlex
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.checks import check_at_least, count, one_line
from data.cli import command, location
from data.config import ValidationConfig, check_where
from data.processes import in_processes
from data.selection.choose import choose_all, look_at_fields, make_plan
from data.selection.fields import KEY
from data.selection.rules import Rules, selection_location
from data.selection.stored import Chosen, Receipt, read_chosen, write_selection
from data.storage.caption_fields import TXT, check_fields
from data.storage.locations import is_remote, join, split, write_whole
from data.storage.shards import (
    CAPTION_DIGESTS,
    INDEX,
    REINDEX,
    Shard,
    is_folder,
    locate,
    read_index,
    read_stats,
    shard_bytes,
)
from data.storage.tars import DIGEST, scan_shard

# Shards named in a report of one kind of fault.
NAMED = 10


@dataclass
class Index:
    """Writes index.json beside the shards: samples, bytes and digest of each, so that a training need not find them.

    They are those of the stats file if our commands wrote it. The headers and captions of other shards are read. The
    fields of the samples are listed. With rules (where, drop, validation_share) a selection by them is written beside
    the index, for a training with the same rules; an index that is up to date is kept then, and another is made again
    with the captions that it has.

    shards: the shards, as data.shards of a training; with rules also an index of them.
    out: the .json to write; default: index.json in the folder of the shards. Required where shards is not a folder.
    captions: fields of further captions, as in data.captions of a training, whose digests are recorded too. For these
    the headers and captions of all shards are read.
    workers: number of processes that read.
    check: read all shards' headers and captions, and report where a stats file says something else.
    where: as data.where of a training.
    drop: as data.drop of a training.
    validation_share: as data.validation.share of a training.
    """

    shards: str = location()
    out: str = location("")
    captions: list[str] = field(default_factory=list)
    workers: int = 8
    check: bool = False
    where: str = ""
    drop: list[str] = location([])
    validation_share: float = 0.0


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
    """Count all shards and write the index, list the fields of the samples, and write the selection if there are rules.

    Raises: ValueError if shards cannot be found or counted, or by the rules chosen; OSError.
    """
    check_at_least("workers", args.workers, 1)
    check_where(args.where)
    check_fields("captions", [TXT, *args.captions])
    rules = Rules(args.where, tuple(args.drop), ValidationConfig(share=args.validation_share).share)
    if args.shards.endswith(".json") and (args.out or not rules):
        raise ValueError(f"shards={args.shards} is an index: name the shards themselves")
    if not args.out and not is_folder(args.shards) and not args.shards.endswith(".json"):
        raise ValueError(f"shards={args.shards} is not a folder: name the file for the index, out=FILE.json")
    out = args.out or (args.shards if args.shards.endswith(".json") else join(args.shards, INDEX))
    kept = (
        rules
        and not args.check
        and not args.captions
        and (args.shards.endswith(".json") or _up_to_date(args.shards, out))
    )
    if not kept:
        captions = args.captions or (_captions_of(out) if rules else [])
        if captions != args.captions:
            print(f"{out} is made again, as before with the captions {', '.join(captions)}")
        write_index(replace(args, captions=captions), out)
    shards = read_index(out)
    if rules:
        select(shards, rules, out, args.workers)
    else:
        try:
            fields = look_at_fields(shards, args.workers)
        except ValueError as error:
            print(f"the fields of the samples can't be read: {error}")
            return
        if fields.kinds.keys() - {KEY}:
            print("\n".join(fields.lines()))


def select(shards: list[Shard], rules: Rules, index: str, workers: int) -> None:
    """Apply the rules to the shards of an index, print what each took, and write the selection beside the index.

    Raises: ValueError if a shard has no digest, or the rules name an unknown field, or choose nothing; OSError.
    """
    if bare := [shard for shard in shards if not _has_digest(shard)]:
        again = REINDEX.format(shlex.quote(split(bare[0].location)[0]))
        raise ValueError(
            f"{count(len(bare), 'shard')} of '{index}' (such as {bare[0].name}) have no digest, by which a selection "
            f"knows its shards: {again}, for this file with out={shlex.quote(index)}"
        )
    digest = rules.digest()
    out = selection_location(index, digest)
    fields = look_at_fields(shards, workers)
    print("\n".join(fields.lines()))
    plan = make_plan(rules, fields)
    if unseen := [name for name, kind in plan.kinds.items() if not kind]:
        print(f"no first sample has a value of {one_line(', '.join(unseen), 300)}: all samples are looked at")
        fields.kinds |= look_at_fields(shards, workers, unseen).kinds
        plan = make_plan(rules, fields)
    unfinished = f"{out}.unfinished"

    def save(done: dict[str, Chosen]) -> None:
        if done and not is_remote(out):
            known = [shard for shard in shards if shard.name in done]
            write_selection(unfinished, digest, plan.texts(), known, [done[shard.name] for shard in known], True)

    done = {} if is_remote(out) else read_chosen(unfinished, digest, shards)
    if done:
        print(f"goes on with an interrupted run: {len(done):,} shards are done (delete '{unfinished}' to begin again)")
    chosen = choose_all(shards, plan, workers, done, save, out)
    receipt = Receipt.of_all(plan.texts(), chosen)
    print("\n".join(receipt.lines()))
    if not receipt.chosen:
        raise ValueError(f"of {receipt.samples:,} samples none is chosen, so there is no selection: loosen the rules")
    size = write_selection(out, digest, plan.texts(), shards, chosen)
    if not is_remote(out):
        Path(unfinished).unlink(missing_ok=True)
    print(f"{out}: {size:,} bytes")


def write_index(args: Index, out: str) -> None:
    """Count all shards and write the index.

    Raises: ValueError if shards cannot be found or counted; OSError.
    """
    entries = _count_all(locate(args.shards), args, out)
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


def _count_all(locations: list[str], args: Index, out: str) -> list[Entry]:
    count_one = partial(count_shard, check=args.check, captions=args.captions)
    return list(in_processes(count_one, locations, args.workers, "shard", "index", out))


def _up_to_date(where: str, out: str) -> bool:
    """Whether an index is there, and was made of the shards as they are."""
    try:
        shards, locations = read_index(out), {split(location)[1]: location for location in locate(where)}
        if {shard.name for shard in shards} != locations.keys() or not all(map(_has_digest, shards)):
            return False
        made = None if is_remote(out) else os.stat(out).st_mtime_ns
        tars = [(shard, os.stat(locations[shard.name])) for shard in shards if not is_remote(shard.location)]
    except (FileNotFoundError, ValueError):
        return False
    return all(tar.st_size == shard.size and (made is None or tar.st_mtime_ns <= made) for shard, tar in tars)


def _captions_of(index: str) -> list[str]:
    """The fields of the captions that an index has beside txt; none if there is no index."""
    try:
        names = list(dict.fromkeys(name for shard in read_index(index) for name in shard.caption_digests))
        check_fields("captions", [TXT, *names])
        return names
    except (FileNotFoundError, ValueError):
        return []


def _has_digest(shard: Shard) -> bool:
    return re.fullmatch("[0-9a-f]{32}", str(shard.digest)) is not None


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
