"""What the shards of a folder were packed from, and how the source differs from that now."""

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.config import ImageRules
from data.images import BadImage, decode
from data.prepare.rows import Picture, Row, Unusable, fingerprint, known_caption_hash, read_picture, signature
from data.progress import Progress
from data.storage.tars import stats_path

# A stats file under this name beside it belongs to a shard that is being written again.
OLD = ".old"
# The entry of a shard's stats file that lists its rows.
ROWS = "rows"


class Entry(NamedTuple):
    """A packed row, as the stats file of its shard lists it.

    number: of the sample in its shard, by which its key is made.  signature: of the row's files when they were read.
    image, caption, more: fingerprints; the last is '' where the source says no more of the picture.
    """

    number: int
    extension: str
    signature: str
    image: str
    caption: str
    name: str
    more: str = ""

    @classmethod
    def of(cls, number: int, row: Row, picture: Picture, version: str) -> "Entry":
        """The entry of a picture that is being packed. version: the row's signature before it was read."""
        image, caption = fingerprint(picture.image), fingerprint(picture.caption.encode())
        more = fingerprint(row.more.encode()) if row.more else ""
        return cls(number, picture.extension, version or "-", image, caption, row.name, more)

    @classmethod
    def parse(cls, line: str) -> "Entry":
        """The inverse of str()."""
        number, extension, version, image, texts, name = line.split(" ", 5)
        caption, _, more = texts.partition(".")
        return cls(int(number), extension, version, image, caption, name, more)

    def __str__(self) -> str:
        texts = f"{self.caption}.{self.more}" if self.more else self.caption
        return f"{self.number} {self.extension} {self.signature} {self.image} {texts} {self.name}"


@dataclass
class Packed:
    """The shards of a folder.

    entries: the rows of each shard, by its number.
    unfinished: shards that must be written again: their writing was interrupted, or their tar is gone.
    """

    entries: dict[int, list[Entry]] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)


@dataclass
class Changes:
    """How a source differs from what was packed.

    kept: the rows that stay, by shard and number.  new: rows that are not packed, with their position in the source.
    touched: shards that must be written again.
    captions, pictures, more, removed: numbers of changed captions, of changed pictures, of pictures of which the source
    says other things in its further columns, and of rows that are gone.
    skipped: (name, reason) of rows that cannot be packed.
    """

    kept: dict[int, dict[int, Row]] = field(default_factory=dict)
    new: list[tuple[int, Row]] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)
    captions: int = 0
    pictures: int = 0
    more: int = 0
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def shard_path(out: Path, number: int) -> Path:
    """The tar of a shard by its number."""
    return out / f"{number:05d}.tar"


def read_packed(out: Path) -> Packed:
    """What the stats files of a folder list.

    Raises: ValueError if a stats file cannot be read or lists no rows; OSError.
    """
    packed = Packed()
    names = (re.fullmatch(r"(\d{5,})_stats\.json(\.old)?", path.name) for path in out.glob("*"))
    found = {int(name[1]) for name in names if name}
    for number in sorted(found):
        shard = shard_path(out, number)
        stats = stats_path(shard)
        if not (shard.exists() and stats.exists()):
            packed.unfinished.add(number)
        stats = stats if stats.exists() else old_stats(shard)
        try:
            packed.entries[number] = [Entry.parse(line) for line in json.loads(stats.read_text(encoding="utf-8"))[ROWS]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"'{stats.absolute()}' does not list the rows of its shard: delete it, and the shard is packed again"
            ) from None
    return packed


def old_stats(shard: Path) -> Path:
    """Where the stats file of a shard lies while the shard is written again."""
    return stats_path(shard).with_name(stats_path(shard).name + OLD)


def compare(rows: Sequence[Row], packed: Packed, rules: ImageRules, progress: Progress) -> Changes:
    """Find what changed. Rows whose files have the same sizes and times are not read.

    progress: of the packed rows.

    Raises: OSError where the machine fails.
    """
    changes = Changes(kept={number: {} for number in packed.entries}, touched=set(packed.unfinished))
    entries = _by_name(packed)
    exact = _exact(rows, entries)
    for position, row in enumerate(rows):
        same_name = entries.get(row.name)
        shard, entry = exact.get(position) or (same_name.pop(0) if same_name else (-1, None))
        if entry is None:
            changes.new.append((position, row))
            continue
        progress.update()
        try:
            _compare_row(row, shard, entry, rules, changes)
            changes.kept[shard][entry.number] = row
        except (Unusable, BadImage) as error:
            changes.skipped.append((row.name, str(error)))
            _remove(changes, shard)
    for left in entries.values():
        for shard, _ in left:
            _remove(changes, shard)
    return changes


def _compare_row(row: Row, shard: int, entry: Entry, rules: ImageRules, changes: Changes) -> None:
    """Count a packed row's changes. Raises: Unusable, BadImage if it cannot be packed any more; OSError."""
    allowed = entry.extension != "webp" or rules.allow_webp
    if not row.problem and allowed and signature(row) == entry.signature:
        return
    picture = read_picture(row, rules)
    new = Entry.of(entry.number, row, picture, "")
    if (new.image, new.caption, new.more) == (entry.image, entry.caption, entry.more):
        return
    decode(picture.image, rules)
    changes.pictures += new.image != entry.image
    changes.more += new.more != entry.more
    changes.captions += new.caption != entry.caption
    changes.touched.add(shard)


def _remove(changes: Changes, shard: int) -> None:
    changes.removed += 1
    changes.touched.add(shard)


def _by_name(packed: Packed) -> dict[str, list[tuple[int, Entry]]]:
    found: dict[str, list[tuple[int, Entry]]] = {}
    for shard, entries in packed.entries.items():
        for entry in entries:
            found.setdefault(entry.name, []).append((shard, entry))
    return found


def _exact(rows: Sequence[Row], entries: dict[str, list[tuple[int, Entry]]]) -> dict[int, tuple[int, Entry]]:
    """The entries that have the caption of a table's row, by the row's position: a table may name a picture repeatedly.

    They are taken out of `entries`, so that the other rows of that name find what is left.
    """
    by_caption: dict[tuple[str, str], deque[tuple[int, Entry]]] = {}
    for name, known in entries.items():
        for pair in known:
            by_caption.setdefault((name, pair[1].caption), deque()).append(pair)
    found = {}
    for position, row in enumerate(rows):
        if matches := by_caption.get((row.name, known_caption_hash(row))):
            found[position] = matches.popleft()
    taken = {(shard, entry.number) for shard, entry in found.values()}
    for name, known in entries.items():
        entries[name] = [pair for pair in known if (pair[0], pair[1].number) not in taken]
    return found
