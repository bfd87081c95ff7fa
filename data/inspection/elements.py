"""What the report of data.inspect is made of: texts that are safe, tables and pictures."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from data.inspection.contact_sheet import printable

# Characters of a caption that are shown.
MAX_CAPTION = 200


def histogram(title: str, values: Sequence[float], edges: Sequence[float]) -> str:
    """Bars for the number of values below the first edge, between successive edges, and from the last edge on."""
    names = [
        f"below {edges[0]}",
        *(f"{a} to {b - 1 if isinstance(b, int) else b}" for a, b in pairwise(edges)),
        f"{edges[-1]} or more",
    ]
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(names)).tolist()
    return f"<div>{table(title, list(zip(names, counts, strict=True)), len(values))}</div>"


def ranking(title: str, counts: Iterable[tuple[str, int]], total: int = 0) -> str:
    """The ten most frequent, as shares of `total`, or if that is 0 of the sum of all counts."""
    ranked = sorted(counts, key=lambda pair: (-pair[1], pair[0]))
    return table(title, ranked[:10], total or sum(count for _, count in ranked))


def table(title: str, rows: list[tuple[str, int]], total: int) -> str:
    """Names with their counts, as shares of `total` and as bars.  title: safe already."""
    largest = max((count for _, count in rows), default=0) or 1
    lines = "".join(
        f'<tr><td class="k">{safe(name)}</td><td class="n">{count:,}</td>'
        f'<td class="n">{count / max(total, 1):.1%}</td>'
        f'<td class="bar">{f"<div style=width:{count / largest:.1%}></div>" if count else ""}</td></tr>'
        for name, count in rows
    )
    return f'<table><tr><th colspan="4">{title}</th></tr>{lines}</table>'


def safe(string: str, max_length: int = MAX_CAPTION) -> str:
    """A string from the data, made safe for any position in the page."""
    return escape(printable(string, max_length), quote=True)


def picture(data: bytes, kind: str) -> str:
    """An image inside the page.  kind: png or jpeg."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}" alt="">'
