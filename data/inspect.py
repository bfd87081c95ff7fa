"""Show what a dataset holds, before a training: `python -m data.inspect shards=DIR out=REPORT.html [text=DIR]`."""

from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from data.checks import check_at_least
from data.cli import command, location
from data.inspection.contact_sheet import contact_sheet
from data.inspection.findings import Findings, TrainingView, inspect_samples
from data.inspection.page import DatasetSummary, page
from data.storage.locations import write_whole
from data.storage.shards import Shard, find_shards, shard_bytes
from data.text.captions import CLEANINGS
from data.text.meta import TextMeta, check_sidecars
from data.text.sidecar_record import WrongSidecar


@dataclass
class Inspect:
    """Shows what is in the shards, what is wrong with it, and samples as the network sees them.

    shards: the shards, as data.shards of a training.
    out: the report, an .html file; or a .png for the pictures alone.
    text: the embeddings, to look at them too.
    samples: how many to look at, spread evenly; 0 for all.
    image_size: pixels, as model.image_size of the training.
    crop_shift: as data.crop_shift of the training.
    seed: as seed of the training.
    """

    shards: str = location()
    out: str = location()
    text: str = location("")
    samples: int = 2000
    image_size: int = 64
    crop_shift: float = 0.1
    seed: int = 0


def inspect(args: Inspect) -> Findings:
    """Look at the samples, print the main numbers and write the report.

    Raises: ValueError if a number cannot be, there is nothing to look at, or the embeddings are of other captions;
    OSError.
    """
    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"out={args.out} must end in .html for the whole report, or in .png for the pictures alone")
    check_at_least("samples", args.samples, 0)
    check_at_least("image_size", args.image_size, 1)
    check_at_least("seed", args.seed, 0)
    check_at_least("crop_shift", args.crop_shift, 0)
    shards = find_shards(args.shards)
    meta = TextMeta.read(args.text) if args.text else None
    summary = DatasetSummary(
        args.shards, shards, _bytes(shards), args.text, meta, _sidecar_fault(shards, args.text, meta)
    )
    view = TrainingView(args.image_size, args.crop_shift, args.seed)
    found = inspect_samples(shards, args.samples, view, args.text, meta)
    for line in _lines(summary, found):
        print(line)
    if out.suffix.lower() == ".html":
        report = page(summary, found, args.image_size).encode()
    else:
        picture = BytesIO()
        contact_sheet(found.tiles).save(picture, "PNG")
        report = picture.getvalue()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(str(out), report)
    print(f"written: {out}")
    return found


def _bytes(shards: list[Shard]) -> int:
    return sum(shard_bytes(shard.location) if shard.size is None else shard.size for shard in shards)


def _sidecar_fault(shards: list[Shard], text: str, meta: TextMeta | None) -> str:
    try:
        if meta:
            check_sidecars(shards, text, meta.tokens, meta.dim)
    except WrongSidecar:
        raise
    except ValueError as error:
        return str(error)
    return ""


def _lines(summary: DatasetSummary, found: Findings) -> list[str]:
    """What is printed: the numbers that decide whether to train on this."""
    lines = [summary.size(), f"looked at {summary.share(found)}"]
    if found.sizes:
        sides = np.repeat([min(size) for size in found.sizes], list(found.sizes.values()))
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common(4))
        lines.append(f"images: {kinds}; shorter side {sides.min()} to {sides.max()} px, median {np.median(sides):.0f}")
    if found.captions:
        letters, repeated = [len(caption) for caption in found.captions], len(found.captions) - len(set(found.captions))
        unknown = f", {found.not_utf8:,} not UTF-8" if found.not_utf8 else ""
        lines.append(
            f"captions: {min(letters)} to {max(letters)} characters, median {np.median(letters):.0f}; "
            f"{found.without_caption:,} missing or empty, {repeated:,} repeat another{unknown}"
        )
    if summary.meta:
        clean = CLEANINGS.get(summary.meta.cleaning, str)  # of another version: what it leaves is not known
        if emptied := sum(not clean(caption).strip() for caption in found.captions if caption.strip()):
            lines.append(f"captions: {emptied:,} are empty after cleaning={summary.meta.cleaning}")
        lines.append(f"embeddings: {summary.meta.tokens} x {summary.meta.dim} {summary.meta.dtype}")
    reasons = Counter(reason for _, reason in found.bad).most_common()
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "none"
    lines.append(f"bad samples: {counts}")
    return lines + [line for line in (summary.sidecar_fault,) if line]


def main(argv: list[str] | None = None) -> None:
    command(inspect, Inspect, argv)


if __name__ == "__main__":
    main()
