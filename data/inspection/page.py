"""The report of data.inspect: one HTML file without scripts that contains its pictures."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from data.inspection import choice_page
from data.inspection.caption_facts import scripts, token_counts
from data.inspection.choice_page import choice_section, scores_section
from data.inspection.contact_sheet import to_image
from data.inspection.elements import histogram, picture, ranking, safe
from data.inspection.findings import FieldCaptions, Findings, Picture, Tile
from data.storage.caption_fields import TXT
from data.storage.shards import Shard
from data.text.meta import TextMeta

# Names of bad samples for a reason, groups of near duplicates, and pictures of each that are shown.
MAX_NAMES, MAX_GROUPS, MAX_ALIKE = 20, 24, 8
# Edges of the histograms' bins.
SIDES = (64, 128, 256, 512, 1024, 2048)
ASPECTS = (0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0)
LETTERS = (20, 40, 80, 160, 320, 640)
WORDS = (3, 6, 12, 24, 48, 96)

STYLE = (
    """
:root { color-scheme: light dark; --line: #8885; --bar: #4a7fc1; --quiet: #777; }
@media (prefers-color-scheme: dark) { :root { --bar: #6d9fdd; --quiet: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; } .facts b { display: block; font-size: 1.35rem; }
.quiet { color: var(--quiet); } .pair { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.pair > div { flex: 0 1 26rem; margin-bottom: 1rem; }
table { border-collapse: collapse; } td, th { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } td.k { min-width: 7.5rem; max-width: 16rem; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--line); }
.bar { min-width: 10rem; } .bar div { background: var(--bar); height: .75rem; margin-top: .4rem; min-width: 1px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 1rem .75rem; }
figure { margin: 0; font-size: 12px; line-height: 1.35; }
figure img { width: 128px; height: 128px; image-rendering: pixelated; display: block; }
figcaption { overflow: hidden; overflow-wrap: anywhere; max-height: 6.75em; } figcaption.quiet { font-size: 10px; }
.beside { display: flex; flex-wrap: wrap; gap: 2rem; } .beside > div { flex: 1 1 24rem; }
.beside .sheet { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
.beside img { width: 96px; height: 96px; }
"""
    + choice_page.STYLE
)


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What is known of a whole dataset without reading its samples.

    where: the shards, as the user gave them.  bytes: of all shards.  text: the folder of the embeddings, '' for none.
    sidecar_fault: why the embeddings do not fit the shards, or ''.
    """

    where: str
    shards: list[Shard]
    bytes: int
    text: str
    meta: TextMeta | None
    sidecar_fault: str

    @property
    def samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    def size(self) -> str:
        """Samples, shards and bytes in one line."""
        empty = sum(not shard.count for shard in self.shards)
        hold_none = f" ({empty:,} of them empty)" if empty else ""
        return f"{self.samples:,} samples in {len(self.shards):,} shards{hold_none}, {format_bytes(self.bytes)}"

    def share(self, findings: Findings) -> str:
        """How much of the dataset was inspected, in words."""
        part = "all" if findings.inspected == self.samples else f"{findings.inspected:,} of {self.samples:,}"
        return f"{part} samples, from {findings.shards_inspected:,} of {self.filled:,} shards that hold any"

    @property
    def filled(self) -> int:
        """How many shards hold samples."""
        return sum(shard.count > 0 for shard in self.shards)


def format_bytes(size: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def page(summary: DatasetSummary, findings: Findings, image_size: int) -> str:
    """The whole report. Every string that comes from the data is escaped in `elements.text`."""
    counts = [shard.count for shard in summary.shards]
    facts = [
        (f"{summary.samples:,}", "samples"),
        (f"{len(counts):,}", f"shards of {min(counts):,} to {max(counts):,}"),
        (format_bytes(summary.bytes), "in the shards"),
        (f"{findings.inspected:,}", f"looked at, in {findings.shards_inspected:,} shards"),
        (f"{len(findings.bad):,}", "of them bad"),
    ]
    head = "".join(f"<span><b>{number}</b>{what}</span>" for number, what in facts)
    title = safe(summary.where)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        # The browser loads and runs nothing, whatever a caption may contain.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{title}</h1><div class="facts">{head}</div>\n'
        f'<p class="quiet">Below: {summary.share(findings)}, taken evenly.</p>\n'
        + "".join(
            (
                choice_section(findings.choice, summary.filled, summary.where) if findings.choice else "",
                _sheet(findings, image_size),
                scores_section(findings.choice, findings) if findings.choice else "",
                _images(findings),
                *(_captions(name, found, summary.meta) for name, found in findings.captions.items()),
                _duplicates(findings),
                _bad(findings),
                _embeddings(summary),
            )
        )
        + "</body></html>\n"
    )


def _sheet(findings: Findings, image_size: int) -> str:
    """The tiles; where rules take some of the samples, those chosen beside those that each rule took."""
    title = f"<h2>What the network sees: crops of {image_size} px, as drawn in the first epoch</h2>"
    rules = findings.choice.receipt.rules if findings.choice else []
    if not rules:
        return f'{title}<div class="sheet">{"".join(map(_figure, findings.tiles))}</div>\n'
    groups = [("chosen", [tile for tile in findings.tiles if not tile.taken])]
    for number, rule in enumerate(rules, 1):
        groups.append((rule.text, [tile for tile in findings.tiles if tile.taken == number]))
    sheets = [
        f'<h3>{safe(name)}</h3><div class="sheet">{"".join(map(_figure, tiles))}</div>'
        for name, tiles in groups
        if tiles
    ]
    return f'{title}<div class="beside"><div>{"".join(sheets[:1])}</div><div>{"".join(sheets[1:])}</div></div>\n'


def _figure(tile: Tile) -> str:
    data = BytesIO()
    to_image(tile.pixels).save(data, "PNG", optimize=True)
    captions = "".join(
        f"<figcaption>{_named(name, tile.captions)}<bdi>{safe(caption)}</bdi></figcaption>"
        if caption.strip()
        else f"<figcaption>{_named(name, tile.captions)}<i>no caption</i></figcaption>"
        for name, caption in tile.captions.items()
    )
    name = f'<figcaption class="quiet">{safe(tile.name)}</figcaption>'
    return f"<figure>{picture(data.getvalue(), 'png')}{captions}{name}</figure>"


def _images(findings: Findings) -> str:
    sizes = [size for size, count in findings.sizes.items() for _ in range(count)]
    if not sizes:
        return "<h2>Images</h2><p>None that can be read.</p>\n"
    cut = np.mean([1 - min(size) / max(size) for size in sizes])
    frequent = ((f"{width} x {height}", count) for (width, height), count in findings.sizes.items())
    return (
        f'<h2>Images</h2><p>The square crop leaves out {cut:.0%} of an image, in the mean.</p><div class="pair">'
        + histogram("Shorter side, px", [min(size) for size in sizes], SIDES)
        + histogram("Width / height", [width / height for width, height in sizes], ASPECTS)
        + f"<div>{ranking('Format and mode', findings.kinds.items())}</div>"
        + f"<div>{ranking('Commonest sizes', frequent)}</div></div>\n"
    )


def _named(name: str, captions: Collection[str]) -> str:
    """The field of a caption, where there are several."""
    return f"<b>{safe(name)}</b> " if len(captions) > 1 else ""


def _captions(name: str, found: FieldCaptions, meta: TextMeta | None) -> str:
    texts, repeats = found.texts, {text: count for text, count in Counter(found.texts).items() if count > 1}
    lines = [
        f"{found.missing:,} samples have no caption, or an empty one; "
        f"{found.repeated:,} captions repeat another one of those looked at."
    ]
    if texts:
        low, middle, high, most = np.quantile([len(text) for text in texts], [0, 0.5, 0.95, 1])
        lines.append(f"Characters: {low:.0f} to {most:.0f}, median {middle:.0f}, 95 % have at most {high:.0f}.")
    return (
        f'<h2>Captions{"" if name == TXT else f": {safe(name)}"}</h2><p>{" ".join(lines)}</p><div class="pair">'
        + histogram("Characters", [len(text) for text in texts], LETTERS)
        + histogram("Words", [len(text.split()) for text in texts], WORDS)
        + _tokens(texts, meta)
        + f"<div>{ranking('Script of most letters', scripts(texts).items())}</div>"
        + (f"<div>{ranking('Most repeated', repeats.items(), len(texts))}</div>" if repeats else "")
        + "</div>\n"
    )


def _tokens(texts: list[str], meta: TextMeta | None) -> str:
    """The lengths of captions in tokens, beside how many the embeddings hold."""
    counts = token_counts(texts, meta)
    if counts is None or meta is None:
        return ""
    most = meta.tokens
    cut = sum(number > most for number in counts)
    edges = sorted({max(most // 8, 1), max(most // 4, 1), max(most // 2, 1), most + 1, 2 * most})
    return histogram(f"Tokens; {cut:,} captions are cut after {most}", counts, edges)


def _duplicates(findings: Findings) -> str:
    """The groups of near duplicates, the largest first."""
    looked = f"{len(findings.pictures):,} pictures that were looked at"
    if not findings.duplicates:
        return f"<h2>Near duplicates</h2><p>None among the {looked}.</p>\n"
    groups = sorted(findings.duplicates, key=len, reverse=True)
    more = sum(len(group) - 1 for group in groups)
    lines = [
        f"{more:,} of the {looked} are near duplicates of another one, in {len(groups):,} groups. "
        f"{safe(findings.duplicate_list, 4000)}"
    ]
    if findings.choice and (held := findings.choice.held):
        taken = findings.choice.looked_at.taken
        both = [group for group in groups if len({taken[p.place] == held for p in group}) > 1]
        lines.append(f"In {len(both):,} groups some are held apart for validation and others are trained on.")
    rows = "".join(
        f'<div class="strip">{"".join(map(_alike, group[:MAX_ALIKE]))}<span class="side">{len(group):,}</span></div>'
        for group in groups[:MAX_GROUPS]
    )
    return f"<h2>Near duplicates</h2><p>{' '.join(lines)}</p>{rows}\n"


def _alike(one: Picture) -> str:
    shown = picture(one.jpeg, "jpeg") if one.jpeg else ""
    return f'<figure>{shown}<figcaption class="quiet">{safe(one.name, 60)}</figcaption></figure>'


def _bad(findings: Findings) -> str:
    if not findings.bad and not findings.damaged:
        return "<h2>Bad samples</h2><p>None among those looked at.</p>\n"
    rows = []
    for reason, count in Counter(reason for _, reason in findings.bad).most_common():
        names = [name for name, why in findings.bad if why == reason]
        more = f" and {count - MAX_NAMES:,} more" if count > MAX_NAMES else ""
        listed = ", ".join(map(safe, names[:MAX_NAMES])) + more
        rows.append(f'<tr><td>{safe(reason)}</td><td class="n">{count:,}</td><td>{listed}</td></tr>')
    damaged = "".join(
        f"<p>{safe(location)} can't be read to its end: {safe(error)}</p>"
        for location, error in findings.damaged[:MAX_NAMES]
    )
    return (
        f"<h2>Bad samples</h2><p>{len(findings.bad):,} of {findings.inspected:,}: the training leaves them out, "
        f"and counts them by these reasons.</p><table>{''.join(rows)}</table>{damaged}\n"
    )


def _embeddings(summary: DatasetSummary) -> str:
    if summary.meta is None:
        return '<h2>Embeddings</h2><p class="quiet">Not looked at: give text=FOLDER.</p>\n'
    meta = summary.meta
    rows = [(name, getattr(meta, name)) for name in meta.entries() if name != "channels"]
    cells = "".join(f"<tr><td>{name}</td><td>{safe(str(value))}</td></tr>" for name, value in rows)
    sizes = f"{format_bytes(meta.nbytes)} a caption, {format_bytes(meta.nbytes * summary.samples)} for all"
    if not meta.nbytes:
        sizes = "as many bytes as each caption needs"
    fault = f"<p><b>{safe(summary.sidecar_fault, 1000)}</b></p>" if summary.sidecar_fault else ""
    return f"<h2>Embeddings</h2>{fault}<p>{safe(summary.text)}: {sizes}.</p><table>{cells}</table>\n"
