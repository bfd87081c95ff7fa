"""What the commands that make shards share: one folder holds one dataset, and a rerun goes on where it stopped."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.images import BadImage, decode
from data.storage.tars import stats_path, write_json, write_shard

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Keys are five digits for the shard and four for the sample, as img2dataset writes them.
MAX_SHARD_SIZE = 10_000

Row = TypeVar("Row")


class Unusable(ValueError):
    """A row that can't become a sample; the message is the reason under which it is counted."""


class Picture(NamedTuple):
    """What a row holds: the bytes of a JPEG or PNG, its caption and where it came from."""

    image: bytes
    caption: str
    origin: str


def key_of(shard: int, place: int) -> str:
    """The key of a sample by the number of its shard and its place there."""
    return f"{shard:05d}{place:04d}"


def check_shard_size(shard_size: int) -> None:
    """Raises: SystemExit if the keys have no room for so many samples a shard."""
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise SystemExit(f"shard_size={shard_size}: must be from 1 to {MAX_SHARD_SIZE}")


def claim_folder(out: Path, record: str, recipe: dict) -> None:
    """Make `out` the folder of this recipe: write it to out/record, or find the same one there.

    Raises: SystemExit if the folder holds shards of another recipe.
    """
    path = out / record
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != recipe:
            changed = [k for k in {**there, **recipe} if there.get(k) != recipe.get(k)]
            was = ", ".join(f"{k}={there.get(k)} (now {recipe.get(k)})" for k in changed)
            raise SystemExit(f"{out} holds another dataset, made with {was}; choose another out= or delete that folder")
        return
    if any(out.glob("*.tar")):
        raise SystemExit(f"{out} holds shards but no {record}: they are not of this command; choose another out=")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def finished(shard: Path) -> dict | None:
    """The stats of a shard that is there whole, or None if it is to be written."""
    stats = stats_path(shard)
    return json.loads(stats.read_text(encoding="utf-8")) if shard.exists() and stats.exists() else None


def pack_rows(rows: Sequence[Row], read: Callable[[Row], Picture], out: Path, shard_size: int) -> None:
    """Write the rows' pictures, byte for byte and in their order, as full shards, and say which were skipped and why.

    read: may raise Unusable. The folder must have been claimed for exactly these rows.
    Raises: SystemExit if no row at all is usable.
    """
    skipped: list[list[str]] = []
    start = number = written = 0
    with tqdm(total=len(rows), desc="packing", unit="img") as bar:
        while start < len(rows):
            shard = out / f"{number:05d}.tar"
            stats = finished(shard)
            if stats is None:
                stats = _write(shard, number, rows, start, read, shard_size, bar)
            else:
                bar.update(stats["count"])
            skipped += stats["skipped"]
            written += stats["successes"]
            start += stats["count"]
            number += 1 if stats["successes"] else 0
    if not written:
        raise SystemExit(f"none of the {len(rows)} pictures is usable:\n{_listing(skipped)}")
    print(f"{written} of {len(rows)} pictures packed in {number} shards: {out}")
    if skipped:
        print(_listing(skipped))


def _write(
    shard: Path, number: int, rows: Sequence[Row], start: int, read: Callable[[Row], Picture], size: int, bar: tqdm
) -> dict:
    """Fill one shard from the rows at `start` on; its stats. Writes nothing if none of them is usable."""
    samples: list[tuple[str, dict[str, bytes]]] = []
    skipped = []
    position = start
    while position < len(rows) and len(samples) < size:
        row = rows[position]
        try:
            samples.append(_sample(key_of(number, len(samples)), read(row)))
        except (Unusable, BadImage) as error:
            skipped.append([str(row) or f"row {position}", str(error)])
        position += 1
        bar.update(1)
    reasons = Counter(reason for _, reason in skipped)
    stats = {
        "count": position - start,
        "successes": len(samples),
        "status_dict": {"success": len(samples), **reasons},
        "skipped": skipped,
    }
    if samples:
        write_shard(shard, samples, stats)
    return stats


def _sample(key: str, picture: Picture) -> tuple[str, dict[str, bytes]]:
    """The members of a sample, its image decoded as the trainer will do it.

    Raises: BadImage.
    """
    width, height = decode(picture.image).size
    facts = {
        "caption": picture.caption,
        "url": picture.origin,
        "key": key,
        "status": "success",
        "width": width,
        "height": height,
    }
    extension = "png" if picture.image.startswith(PNG_SIGNATURE) else "jpg"
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    return key, {extension: picture.image, "txt": picture.caption.encode(), "json": text.encode()}


def _listing(skipped: list[list[str]]) -> str:
    """One line per reason: how many, and the first names."""
    lines = []
    for reason, count in Counter(reason for _, reason in skipped).most_common():
        names = [name for name, why in skipped if why == reason][:3]
        lines.append(f"  {count} skipped, {reason}: {', '.join(names)}{', ...' if count > 3 else ''}")
    return "\n".join(lines)
