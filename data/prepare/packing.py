"""Packing pictures into the shards of a folder, which holds one dataset; a rerun writes the shards that changed."""

import itertools
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.checks import count, one_line
from data.config import ImageRules
from data.images import BadImage, decode
from data.prepare.changes import OLD, ROWS, Changes, Entry, compare, old_stats, read_packed, shard_path
from data.prepare.rows import NO_PICTURE, Picture, Row, Unusable, read_picture, signature
from data.progress import Progress
from data.storage.locations import write_whole
from data.storage.shards import INDEX
from data.storage.tars import STATS, Sample, stats_path, write_json, write_shard

# A key has five digits for the shard and four for the sample, as img2dataset writes it.
MAX_SHARD_SIZE = 10_000
# The list of all rows that were not packed.
SKIPPED = "skipped.tsv"
# Most reasons and most shards that are printed, and most names for each reason.
MOST, NAMED = 10, 3


def key_of(shard: int, row: int) -> str:
    """The key of a sample: the number of its shard, and its number there."""
    return f"{shard:05d}{row:04d}"


def check_shard_size(shard_size: int) -> None:
    """Raises: ValueError if the keys have no digits for so many samples a shard."""
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(f"shard_size={shard_size} must be from 1 to {MAX_SHARD_SIZE}")


def record_recipe(out: Path, name: str, recipe: dict) -> None:
    """Write what a dataset is made from to out/name, or find the same recipe there.

    Raises: ValueError if the folder holds another dataset; OSError.
    """
    before = read_recipe(out, name)
    if before is None:
        write_json(out / name, recipe)
    elif before != recipe:
        raise another_dataset(out, before, recipe)


def read_recipe(out: Path, name: str) -> dict | None:
    """The recipe that was recorded as out/name; None if `out` holds no shards, finished or not. The folder is made.

    Raises: ValueError if the folder holds shards of another command; OSError.
    """
    path = out / name
    if not any(out.glob("*.tar")) and not any(out.glob(f"*{STATS}*")):
        out.mkdir(parents=True, exist_ok=True)
        return None
    if not path.exists():
        raise ValueError(f"'{out.absolute()}' holds shards of another command (no {name}): choose another out=")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{path.absolute()}' cannot be read ({error}): choose another out=, or delete that folder"
        ) from None


def another_dataset(out: Path, before: dict, recipe: dict) -> ValueError:
    """The error for a folder whose recipe is not the one that is asked for."""
    changed = [k for k in {**before, **recipe} if before.get(k) != recipe.get(k)]
    was = ", ".join(f"{k}={before.get(k)} (now {recipe.get(k)})" for k in changed)
    return ValueError(
        f"'{out.absolute()}' holds another dataset, made with {was}: choose another out=, or delete that folder"
    )


def finished(shard: Path) -> bool:
    """Whether a shard was written to its end."""
    return shard.exists() and stats_path(shard).exists()


def find_changes(rows: Sequence[Row], out: Path, rules: ImageRules) -> Changes:
    """How the rows differ from those that the shards of a folder hold.

    Raises: ValueError if the shards' stats files cannot be read; OSError.
    """
    packed = read_packed(out)
    total = sum(map(len, packed.entries.values()))
    with Progress("comparing", total, "picture") as progress:
        return compare(rows, packed, rules, progress)


def write_changes(changes: Changes, out: Path, shard_size: int, rules: ImageRules, workers: int = 1) -> bool:
    """Write the shards that changed; print what changed, and which rows were skipped and why.

    The pictures go in byte for byte and in their order. Rows that are packed stay in their shard, with their key. New
    rows go to shards that are missing, to the last shard with room, then to further ones. Shards and the folder's index
    are never out of step: an index is removed first. If the writing is interrupted, the next call completes it.
    workers: threads that read and check new pictures, ahead of the writing.
    Returns: whether there was an index, which is to be made again.
    Raises: ValueError if no row is usable, with everything left as it is; OSError.
    """
    writer = _Writer(changes, out, shard_size, rules, workers)
    writer.write()
    for line in writer.lines():
        print(line)
    return writer.index_removed


class _Usable(NamedTuple):
    """A row that can be packed.  version: its signature before it was read.  size: width and height."""

    row: Row
    picture: Picture
    version: str
    size: tuple[int, int]


class _Writer:
    """Writes what changed.

    rewritten, fresh, gone: the shards that were written again, that are new, and that have no rows any more.
    added: how many new rows were packed.  packed: how many rows are in the shards.
    """

    def __init__(self, changes: Changes, out: Path, shard_size: int, rules: ImageRules, workers: int) -> None:
        self.changes, self.out, self.shard_size, self.rules, self.workers = changes, out, shard_size, rules, workers
        self.index_removed = False
        self.rewritten: list[int] = []
        self.fresh: list[int] = []
        self.gone: list[int] = []
        self.added, self.packed = 0, sum(map(len, changes.kept.values()))
        self.skipped = list(changes.skipped)
        self._new: Iterator[_Usable] = iter(())
        self._next: _Usable | None = None

    def write(self) -> None:
        """Write all shards that changed, in the order of their numbers."""
        kept = self.changes.kept
        with Progress("packing", len(self.changes.new), "picture", self.out) as progress:
            self._new = self._usable(progress)
            self._next = next(self._new, None)
            if self._next is None and not self.packed:
                for line in _listing(self.skipped):
                    progress.write(line)
                raise ValueError(f"none of {count(self.pictures, 'picture')} is usable; the reasons are above")
            last_with_room = max((n for n, rows in kept.items() if 0 < len(rows) < self.shard_size), default=-1)
            for number in itertools.count():
                if self._next is None and number > max(kept, default=-1):
                    break
                rows = kept.get(number, {})
                room = self.shard_size - len(rows) if not rows or number == last_with_room else 0
                if number in self.changes.touched or (room and self._next):
                    self._write_shard(number, rows, room)
        self._remove_leftovers()
        self._list_skipped()

    @property
    def pictures(self) -> int:
        """The pictures of the source, packed and skipped."""
        return self.packed + sum(reason != NO_PICTURE for _, reason in self.skipped)

    def lines(self) -> list[str]:
        """What is printed at the end."""
        shards = len([rows for number, rows in self.changes.kept.items() if number not in self.gone]) + len(self.fresh)
        lines = self._what_changed() if self.changes.kept and (self.rewritten or self.fresh or self.gone) else []
        lines.append(
            f"{self.packed:,} of {count(self.pictures, 'picture')} packed in {count(shards, 'shard')}: {self.out}"
        )
        lines += _listing(self.skipped)
        if len(self.skipped) > NAMED:
            lines.append(f"  all that were skipped are listed in {self.out / SKIPPED}")
        return lines

    def _usable(self, progress: Progress) -> Iterator[_Usable]:
        """The new rows that can be packed, in their order; the others are added to those skipped.

        Threads suffice: reading and decoding leave Python's lock to the others.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque[tuple[str, Future[_Usable | str]]] = deque()
            for position, row in self.changes.new:
                ahead.append((row.name or f"row {position}", pool.submit(self._read, row)))
                if len(ahead) == 2 * self.workers:
                    yield from self._taken(*ahead.popleft(), progress)
            for name, read in ahead:
                yield from self._taken(name, read, progress)

    def _taken(self, name: str, read: "Future[_Usable | str]", progress: Progress) -> Iterator[_Usable]:
        usable = read.result()
        progress.update()
        if isinstance(usable, str):
            self.skipped.append((name, usable))
        else:
            yield usable

    def _read(self, row: Row) -> _Usable | str:
        """A row that can be packed, or why it cannot. Raises: OSError where the machine fails."""
        try:
            version = signature(row)
            picture = read_picture(row, self.rules)
            return _Usable(row, picture, version, decode(picture.image, self.rules).size)
        except (Unusable, BadImage) as error:
            return str(error)

    def _write_shard(self, number: int, kept: dict[int, Row], room: int) -> None:
        shard = shard_path(self.out, number)
        entries: list[str] = []
        index = self.out / INDEX
        self.index_removed |= index.exists()
        index.unlink(missing_ok=True)
        known = number in self.changes.kept
        # Under its other name the stats file still lists the rows, while all others see an unfinished shard.
        if stats_path(shard).exists():
            os.replace(stats_path(shard), old_stats(shard))
        if kept or self._next:
            # The entries are there when the stats file is written, which is after the samples.
            write_shard(shard, self._samples(number, kept, room, entries), {ROWS: entries})
        if not entries:
            shard.unlink(missing_ok=True)
            stats_path(shard).unlink(missing_ok=True)
        old_stats(shard).unlink(missing_ok=True)
        (self.gone if not entries else self.rewritten if known else self.fresh).append(number)

    def _samples(self, number: int, kept: dict[int, Row], room: int, entries: list[str]) -> Iterator[Sample]:
        """The samples of a shard by their numbers: the rows that are kept, and new ones at the first free numbers."""
        last = max(kept, default=-1)
        for place in range(MAX_SHARD_SIZE):
            usable: _Usable | None = None
            if place in kept:
                read = self._read(kept[place])
                if isinstance(read, str):
                    self.skipped.append((kept[place].name, read))
                    self.packed -= 1
                else:
                    usable = read
            elif room and self._next:
                usable, self._next, room = self._next, next(self._new, None), room - 1
                self.added, self.packed = self.added + 1, self.packed + 1
            elif place > last:
                break
            if usable:
                entries.append(str(Entry.of(place, usable.row, usable.picture, usable.version)))
                yield _sample(key_of(number, place), usable)

    def _remove_leftovers(self) -> None:
        """Remove what interrupted runs left: tars whose rows are in other shards or in none now, old stats files."""
        for stats in self.out.glob(f"*{STATS}{OLD}"):
            stats.unlink()
        for tar in self.out.glob("*.tar"):
            if re.fullmatch(r"\d{5,}", tar.stem) and not finished(tar):
                tar.unlink()

    def _list_skipped(self) -> None:
        path = self.out / SKIPPED
        if self.skipped:
            lines = "".join(f"{one_line(name, 1000)}\t{reason}\n" for name, reason in self.skipped)
            write_whole(str(path), lines.encode())
        else:
            path.unlink(missing_ok=True)

    def _what_changed(self) -> list[str]:
        c = self.changes
        counts = (
            (c.captions, "caption", "changed"), (c.pictures, "picture", "changed"),
            (c.more, "picture", "with changed columns"), (self.added, "picture", "added"),
            (c.removed, "picture", "removed"),
        )  # fmt: skip
        what = [f"{count(number, noun)} {done}" for number, noun, done in counts if number]
        shards = [
            f"{_shards(numbers)} {done}"
            for numbers, done in ((self.rewritten, "written again"), (self.fresh, "new"), (self.gone, "removed"))
            if numbers
        ]
        return [f"{', '.join(what) or 'an interrupted packing is completed'}: {', '.join(shards)}"]


def _shards(numbers: list[int]) -> str:
    names = [f"{number:05d}" for number in numbers]
    if len(names) > MOST:
        return f"{len(names):,} shards ({names[0]} to {names[-1]})"
    return f"shards {', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"shard {names[0]}"


def _sample(key: str, usable: _Usable) -> Sample:
    """The key and members of a sample."""
    row, picture, _, (width, height) = usable
    facts = {"url": row.name} | (json.loads(row.more) if row.more else {})
    facts |= {"caption": picture.caption, "key": key, "status": "success", "width": width, "height": height}
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    return key, {picture.extension: picture.image, "txt": picture.caption.encode(), "json": text.encode()}


def _listing(skipped: list[tuple[str, str]]) -> list[str]:
    """A line for each reason: how many rows, and the first names."""
    lines = []
    counts = Counter(reason for _, reason in skipped).most_common()
    for reason, number in counts[:MOST]:
        names = [one_line(name) for name, why in skipped if why == reason][:NAMED]
        lines.append(f"  {number} skipped, {reason}: {', '.join(names)}{', ...' if number > NAMED else ''}")
    if len(counts) > MOST:
        lines.append(f"  {sum(number for _, number in counts[MOST:])} skipped for {len(counts) - MOST} more reasons")
    return lines
