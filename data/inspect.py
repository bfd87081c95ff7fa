"""Show what a dataset holds, before a training: `python -m data.inspect shards=DIR out=REPORT.html [text=DIR]`."""

from collections import Counter
from csv import writer
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from shlex import quote

import numpy as np

from data.checks import check_at_least, count
from data.cli import command, location
from data.config import ValidationConfig, check_where
from data.inspection.choice import look_at_choice
from data.inspection.contact_sheet import contact_sheet
from data.inspection.findings import FieldCaptions, Findings, TrainingView, choose_rows, inspect_samples
from data.inspection.page import DatasetSummary, format_bytes, page
from data.selection.drop import GROUP
from data.selection.rules import Rules
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
    where: as data.where of a training: the report shows what it would choose.
    drop: as data.drop of a training.
    validation_share: as data.validation.share of a training.
    workers: number of processes that read the fields.
    """

    shards: str = location()
    out: str = location()
    text: str = location("")
    samples: int = 2000
    image_size: int = 64
    crop_shift: float = 0.1
    seed: int = 0
    captions: list[str] = field(default_factory=lambda: [TXT])
    where: str = ""
    drop: list[str] = location([])
    validation_share: float = 0.0
    workers: int = 8


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
    check_at_least("workers", args.workers, 1)
    check_where(args.where)
    rules = Rules(args.where, tuple(args.drop), ValidationConfig(share=args.validation_share).share)
    shards = find_shards(args.shards)
    meta = TextMeta.read(args.text) if args.text else None
    summary = DatasetSummary(
        args.shards, shards, _bytes(shards), args.text, meta, _sidecar_fault(shards, args.text, meta, args.captions)
    )
    view = TrainingView(args.image_size, args.crop_shift, args.seed)
    rows = choose_rows([shard.count for shard in shards], args.samples)
    choice = look_at_choice(shards, rows, rules, args.workers)
    found = inspect_samples(shards, args.samples, view, args.text, meta, args.captions, choice, args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.duplicate_list = _write_duplicates(found, out, args.drop)
    for line in _lines(summary, found, args.image_size):
        print(line)
    if out.suffix.lower() == ".html":
        report = page(summary, found, args.image_size).encode()
    else:
        picture = BytesIO()
        contact_sheet(found.tiles).save(picture, "PNG")
        report = picture.getvalue()
    write_whole(str(out), report)
    print(f"written: {out}, {format_bytes(len(report))}")
    return found


def _write_duplicates(found: Findings, out: Path, drop: list[str]) -> str:
    """Write the near duplicates as a list for data.drop, beside the report. Returns what is to be said of it."""
    if not found.duplicates:
        return ""
    path = out.with_name(f"{out.stem}-near-duplicates.csv")
    keys = Counter(picture.key for picture in found.pictures.values())
    if keys.total() > len(keys):
        return "There is no list for drop=, since keys of different samples are the same."
    if str(path.resolve()) in (str(Path(name).resolve()) for name in drop):
        return f"{path.name} is kept as it is, since it is one of the lists in drop=."
    # A line break in a key would begin another row.
    rows = [
        (picture.key, str(number))
        for number, group in enumerate(found.duplicates, 1)
        for picture in group
        if picture.key.splitlines() == [picture.key]
    ]
    text = StringIO()
    writer(text, lineterminator="\n").writerows([("key", GROUP), *rows])
    write_whole(str(path), text.getvalue().encode())
    return f"{path} lists them: {quote(f'drop={path}')} keeps the first of each group, which has the most pixels."


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


def _lines(summary: DatasetSummary, found: Findings, image_size: int) -> list[str]:
    """What is printed: the numbers that decide whether to train on this."""
    lines = [summary.size(), f"looked at {summary.share(found)}"]
    if found.sizes:
        sides = np.repeat([min(size) for size in found.sizes], list(found.sizes.values()))
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common(4))
        lines.append(f"images: {kinds}; shorter side {sides.min()} to {sides.max()} px, median {np.median(sides):.0f}")
        if small := np.count_nonzero(sides < image_size):
            lines.append(
                f"images: {small:,} with a shorter side below image_size={image_size}: a training enlarges those"
            )
    for name, captions in found.captions.items():
        lines += _caption_lines("captions" if name == TXT else f"captions {name}", captions, summary.meta)
    if summary.meta:
        lines.append(f"embeddings: {summary.meta.tokens} x {summary.meta.dim} {summary.meta.dtype}")
    reasons = Counter(reason for _, reason in found.bad).most_common()
    counts = ", ".join(f"{number:,} {reason}" for reason, number in reasons) or "none"
    lines.append(f"bad samples: {counts}")
    more = sum(len(group) - 1 for group in found.duplicates)
    groups = f"{more:,} in {count(len(found.duplicates), 'group')}. {found.duplicate_list}" if more else "none"
    lines.append(f"near duplicates: {groups}")
    lines += found.choice.lines() if found.choice else []
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
