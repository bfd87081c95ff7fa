"""Show what a dataset holds, before a training: `python -m data.inspect shards=DIR out=REPORT.html [text=DIR]`."""

from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from data.checks import check_at_least
from data.cli import command, location
from data.inspection.contact_sheet import contact_sheet
from data.inspection.findings import FieldCaptions, Findings, TrainingView, inspect_samples
from data.inspection.page import DatasetSummary, page
from data.storage.caption_fields import TXT, check_fields
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
    captions: the fields of the captions, as in data.captions of the training. Of several captions of a sample the
    embedding of the first is looked at; data.embed mode=check looks at all.
    """

    shards: str = location()
    out: str = location()
    text: str = location("")
    samples: int = 2000
    image_size: int = 64
    crop_shift: float = 0.1
    seed: int = 0
    captions: list[str] = field(default_factory=lambda: [TXT])


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
    check_fields("captions", args.captions)
    shards = find_shards(args.shards)
    meta = TextMeta.read(args.text) if args.text else None
    summary = DatasetSummary(
        args.shards, shards, _bytes(shards), args.text, meta, _sidecar_fault(shards, args.text, meta, args.captions)
    )
    view = TrainingView(args.image_size, args.crop_shift, args.seed)
    found = inspect_samples(shards, args.samples, view, args.text, meta, args.captions)
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


def _sidecar_fault(shards: list[Shard], text: str, meta: TextMeta | None, captions: list[str]) -> str:
    try:
        if meta:
            check_sidecars(shards, text, meta.tokens, meta.dim, captions)
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
    for name, captions in found.captions.items():
        lines += _caption_lines("captions" if name == TXT else f"captions {name}", captions, summary.meta)
    if summary.meta:
        lines.append(f"embeddings: {summary.meta.tokens} x {summary.meta.dim} {summary.meta.dtype}")
    reasons = Counter(reason for _, reason in found.bad).most_common()
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "none"
    lines.append(f"bad samples: {counts}")
    return lines + [line for line in (summary.sidecar_fault,) if line]


def _caption_lines(what: str, captions: FieldCaptions, meta: TextMeta | None) -> list[str]:
    letters = [len(text) for text in captions.texts]
    size = f"{min(letters)} to {max(letters)} characters, median {np.median(letters):.0f}; " if letters else ""
    unknown = f", {captions.not_utf8:,} not UTF-8" if captions.not_utf8 else ""
    lines = [f"{what}: {size}{captions.missing:,} missing or empty, {captions.repeated:,} repeat another{unknown}"]
    clean = CLEANINGS.get(meta.cleaning, str) if meta else str  # of another version: what it leaves is not known
    if meta and (emptied := sum(not clean(text).strip() for text in captions.texts)):
        lines.append(f"{what}: {emptied:,} are empty after cleaning={meta.cleaning}")
    return lines


def main(argv: list[str] | None = None) -> None:
    command(inspect, Inspect, argv)


if __name__ == "__main__":
    main()
