"""A drawing of the values of a score: how many samples have which, and how many are left at each threshold."""

from collections.abc import Sequence

import numpy as np

from data.inspection.elements import safe
from data.selection.where import Threshold

WIDTH, HEIGHT, TOP, BOTTOM, LEFT = 560, 130, 16, 18, 34
BINS, TICKS = 48, 5
# Values beyond these shares are drawn in the outermost bars, since scores have long tails.
TAIL = 0.005
# Larger values are drawn as this one.
LARGEST = 1e150
SHARES = (0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01)

STYLE = """
svg { width: 100%; max-width: 600px; height: auto; font: 10px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .kept { fill: var(--bar); } svg .out { fill: #8886; }
svg .share { fill: none; stroke: #d07a2d; stroke-width: 1.6; } svg .at { stroke: #c0392b; stroke-width: 1.4; }
svg .grid { stroke: var(--line); }
"""


def chart(values: np.ndarray, left_out: np.ndarray, thresholds: Sequence[Threshold]) -> str:
    """Bars of the values, those that rules leave out in grey; a line for the share left; lines for the thresholds.

    values: float64 [n], NaN where missing.  left_out: bool [n].
    The line tells the share of all samples at or above a value, or below it if the thresholds keep what is below.
    """
    there = np.isfinite(values)
    clipped = np.clip(values[there], -LARGEST, LARGEST)
    if not len(clipped):
        return ""
    edges = _edges(clipped, [threshold.number for threshold in thresholds if np.isfinite(threshold.number)])
    low, high = float(edges[0]), float(edges[-1])
    place = np.clip(np.searchsorted(edges, clipped, side="right") - 1, 0, len(edges) - 2)
    out = np.bincount(place[left_out[there]], minlength=len(edges) - 1)
    kept = np.bincount(place, minlength=len(edges) - 1) - out
    most = int((kept + out).max())

    def x(value: float) -> float:
        return round(LEFT + (min(max(value, low), high) - low) / (high - low) * WIDTH, 1)

    def y(share: float) -> float:
        return round(TOP + HEIGHT * (1 - share), 1)

    below = bool(thresholds) and all(threshold.op.startswith("<") for threshold in thresholds)
    under = np.searchsorted(np.sort(clipped), edges, side="left") / len(values)
    shares = under if below else len(clipped) / len(values) - under
    line = " ".join(f"{x(edge)},{y(share)}" for edge, share in zip(edges.tolist(), shares.tolist(), strict=True))
    parts = [
        f'<path class="grid" d="M{LEFT} {y(share)}h{WIDTH}"/><text x="0" y="{y(share) + 3}">{share:.0%}</text>'
        for share in (0, 0.5, 1)
    ]
    for name, heights, base in (("kept", kept, np.zeros_like(kept)), ("out", out, kept)):
        bars = "".join(
            f"M{x(edges[i])} {y(b / most)}V{y((b + h) / most)}H{x(edges[i + 1])}V{y(b / most)}Z"
            for i, (h, b) in enumerate(zip(heights.tolist(), base.tolist(), strict=True))
            if h
        )
        parts.append(f'<path class="{name}" d="{bars}"/>')
    parts.append(f'<polyline class="share" points="{line}"/>')
    for threshold in thresholds:
        at = x(threshold.number)
        side = "end" if at > LEFT + WIDTH / 2 else "start"
        parts.append(
            f'<path class="at" d="M{at} {TOP}v{HEIGHT}"/><text x="{at}" y="{TOP - 4}" text-anchor="{side}">'
            f"{safe(threshold.op)} {number(threshold.number)}</text>"
        )
    for value in np.linspace(low, high, TICKS).tolist():
        parts.append(f'<text x="{x(value)}" y="{TOP + HEIGHT + 13}" text-anchor="middle">{number(value)}</text>')
    size = f"0 0 {LEFT + WIDTH + 26} {TOP + HEIGHT + BOTTOM}"
    return f'<svg viewBox="{size}" role="img">{"".join(parts)}</svg>'


def number(value: float) -> str:
    """A number as a threshold is written: short, without commas."""
    return f"{value:.0f}" if abs(value) < 1e9 and value == round(value) else f"{value:.4g}"


def keeps(values: np.ndarray, threshold: Threshold) -> float:
    """The share of all samples that a threshold keeps by itself."""
    compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}[threshold.op]
    return float(compare(values, threshold.number).mean()) if len(values) else 0.0


def share_table(values: np.ndarray) -> str:
    """The thresholds at which given shares of all samples are left."""
    found = np.sort(values[~np.isnan(values)])
    rows = []
    for share in SHARES:
        rank = round(share * len(values))
        if 1 <= rank <= len(found):
            rows.append(
                f'<tr><td class="n">{share:.0%}</td><td class="n">{number(float(found[len(found) - rank]))}</td>'
                f'<td class="n">{number(float(found[rank - 1]))}</td></tr>'
            )
    return f"<table><tr><th>keeps</th><th>&gt;=</th><th>&lt;=</th></tr>{''.join(rows)}</table>" if rows else ""


def _edges(values: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """The edges of the bars: around whole numbers, if the values are few of those."""
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    low, high = min([low, *numbers]), max([high, *numbers])
    low, high = max(low, -LARGEST), min(high, LARGEST)
    if (values == np.rint(values)).all() and high - low < BINS and max(abs(low), abs(high)) < 2**52:
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    if not low + (high - low) / BINS > low:
        step = max(abs(low), 1.0) * 0.01
        low, high = low - step, high + step
    return np.linspace(low, high, BINS + 1)
