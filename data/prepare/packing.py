"""What the commands that make shards share: a folder holds one dataset, and a rerun makes only what is missing."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.images import BadImage, decode
from data.storage.tars import stats_path, write_json, write_shard

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A key has five digits for the shard and four for the sample, as img2dataset writes it.
MAX_SHARD_SIZE = 10_000

Row = TypeVar("Row")


class Unusable(ValueError):
    """A row cannot become a sample; rows are counted by this error's message."""


class Picture(NamedTuple):
    """A captioned picture: the bytes of a JPEG or PNG, its caption, and the path or name it is known by."""

    image: bytes
    caption: str
    source: str


def key_of(shard: int, row: int) -> str:
    """The key of a sample: the number of its shard, and its row there."""
    return f"{shard:05d}{row:04d}"


def check_shard_size(shard_size: int) -> None:
    """Raises: ValueError if the keys have no digits for so many samples a shard."""
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(f"shard_size={shard_size} must be from 1 to {MAX_SHARD_SIZE}")


def record_recipe(out: Path, name: str, recipe: dict) -> None:
    """Write what a dataset is made from to out/name, or find the same recipe there.

    Raises: ValueError if the folder holds another dataset; OSError.
    """
    path = out / name
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != recipe:
            changed = [k for k in {**before, **recipe} if before.get(k) != recipe.get(k)]
            was = ", ".join(f"{k}={before.get(k)} (now {recipe.get(k)})" for k in changed)
            raise ValueError(
                f"'{out.absolute()}' holds another dataset, made with {was}: choose another out=, or delete that folder"
            )
        return
    if any(out.glob("*.tar")):
        raise ValueError(f"'{out.absolute()}' holds shards of another command (no {name}): choose another out=")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def finished(shard: Path) -> dict | None:
    """The stats of a shard that was written to its end, else None."""
    stats = stats_path(shard)
    return json.loads(stats.read_text(encoding="utf-8")) if shard.exists() and stats.exists() else None


def pack_rows(rows: Sequence[Row], read: Callable[[Row], Picture], out: Path, shard_size: int) -> None:
    """Write the rows' pictures, byte for byte and in their order, as full shards; print which were skipped and why.

    read: the picture of a row; may raise Unusable.  out: its recipe must be recorded, and name exactly these rows.
    Raises: ValueError if no row is usable; OSError.
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
    if written:
        print(f"{written} of {len(rows)} pictures packed in {number} shards: {out}")
    for line in _listing(skipped):
        print(line)
    if not written:
        raise ValueError(f"none of the {len(rows)} pictures is usable; the reasons are above")


def _write(
    shard: Path, number: int, rows: Sequence[Row], start: int, read: Callable[[Row], Picture], size: int, bar: tqdm
) -> dict:
    """Fill one shard with the rows from `start` on. Returns its stats. Writes nothing if no row is usable."""
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
    """The key and members of a sample. The image is decoded as the trainer decodes it.

    Raises: BadImage.
    """
    width, height = decode(picture.image).size
    facts = {
        "caption": picture.caption,
        "url": picture.source,
        "key": key,
        "status": "success",
        "width": width,
        "height": height,
    }
    extension = "png" if picture.image.startswith(PNG_SIGNATURE) else "jpg"
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    return key, {extension: picture.image, "txt": picture.caption.encode(), "json": text.encode()}


def _listing(skipped: list[list[str]]) -> list[str]:
    """A line for each reason: how many rows, and the first names."""
    lines = []
    for reason, count in Counter(reason for _, reason in skipped).most_common():
        names = [name for name, why in skipped if why == reason][:3]
        lines.append(f"  {count} skipped, {reason}: {', '.join(names)}{', ...' if count > 3 else ''}")
    return lines
