"""The part of the report that shows what rules choose: their counts, each score with the thresholds, the labels."""

from collections.abc import Sequence

import numpy as np

from data.checks import count
from data.inspection import chart
from data.inspection.choice import Choice, Values, scope
from data.inspection.elements import picture, ranking, safe
from data.inspection.findings import Findings, Picture
from data.selection.where import Threshold

# Pictures on each side of a threshold; along a score without one.
BESIDE, ALONG = 7, 14

STYLE = (
    chart.STYLE
    + """
.score { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin-top: 1.5rem; } .score h3 { flex: 1 0 100%; margin: 0; }
.score > svg { flex: 1 1 26rem; } .score table { font-size: 12px; }
.strip { flex: 1 0 100%; display: flex; flex-wrap: wrap; gap: 4px; } .strip figure { width: 64px; }
.strip img { width: 64px; height: 64px; } .strip .side { align-self: center; font-size: 12px; padding: 0 .3rem; }
code { overflow-wrap: anywhere; } h3 { font-size: 1rem; overflow-wrap: anywhere; }
"""
)


def choice_section(choice: Choice, filled: int, shards: str) -> str:
    """What each rule takes.  filled: how many shards hold samples.  shards: as the user gave them."""
    if not choice.rules:
        return ""
    samples, lines = max(choice.receipt.samples, 1), ""
    left = choice.receipt.samples
    for text, took, missing in choice.receipt.rules:
        left -= took
        cells = (f"{took:,}", f"{missing:,}", f"{left:,}", f"{left / samples:.1%}")
        lines += f"<tr><td>{safe(text, 1000)}</td>{''.join(map(_cell, cells))}</tr>"
    parts = "".join(
        f"<tr><td>{safe(text, 1000)}</td>{''.join(_cell(f'{number:,}') for number in numbers)}</tr>"
        for text, *numbers in choice.parts
    )
    each = (
        "<h3>Each condition of <code>where</code> by itself</h3><table><tr><th>condition</th><th>fail it</th>"
        f"<th>for a missing field</th><th>fail it alone</th></tr>{parts}</table>"
        if len(choice.parts) > 1
        else ""
    )
    part = "" if choice.shards == filled else " The command counts all."
    return (
        f"<h2>What the rules choose</h2><p>{choice.receipt.chosen:,} of {scope(choice, filled)}, "
        f"{choice.receipt.chosen / samples:.1%}. Each rule takes from what those above it leave."
        f"{part}</p><table><tr><th>rule</th><th>takes</th><th>for a missing field</th><th>left</th><th></th></tr>"
        f"{lines}</table>{each}<p>The selection for a training: <code>{safe(choice.rules.command(shards), 4000)}</code>"
        "</p>\n"
    )


def _cell(number: str) -> str:
    return f'<td class="n">{number}</td>'


def scores_section(choice: Choice, findings: Findings) -> str:
    """The distribution of each score, with its thresholds and pictures along it; and the values of labels."""
    if choice.problem:
        return f"<h2>Scores</h2><p>The fields of the samples can't be read: {safe(choice.problem, 1000)}</p>\n"
    numbers = choice.values.numbers
    if not numbers and not choice.texts:
        return '<h2>Scores</h2><p class="quiet">No sample has a field with numbers or labels.</p>\n'
    out = choice.left_out(choice.values.taken)
    scores = "".join(_score(name, values, out, choice, findings) for name, values in numbers.items())
    labels = "".join(
        f"<div>{ranking(safe(name), counts.items(), choice.receipt.samples)}</div>"
        for name, counts in choice.texts.items()
    )
    grey = " Grey: what the rules leave out." if choice.rules else ""
    return (
        f"<h2>Scores</h2><p>Of {count(len(choice.values.taken), 'sample')}. Bars: how many have a value.{grey} "
        "The line: the share of all samples that a threshold at this place leaves by itself, those at or above it, "
        "or below it where <code>where</code> keeps what is below. A comparison never chooses a sample without the "
        "field.</p>"
        f"{scores}" + (f'<h2>Labels</h2><div class="pair">{labels}</div>' if labels else "") + "\n"
    )


def _score(name: str, values: np.ndarray, out: np.ndarray, choice: Choice, findings: Findings) -> str:
    there = values[~np.isnan(values)]
    thresholds = [threshold for threshold in choice.thresholds if threshold.of == name]
    facts = [f"{count(len(values) - len(there), 'sample')} without it."]
    if len(there):
        low, middle, high = (chart.number(float(v)) for v in (there.min(), np.median(there), there.max()))
        facts.insert(0, f"{low} to {high}, median {middle}.")
    facts += [
        f"<b>{safe(threshold.op)} {chart.number(threshold.number)}</b> keeps {chart.keeps(values, threshold):.1%}."
        for threshold in thresholds
    ]
    strips = "".join(_beside(threshold, choice.looked_at, findings) for threshold in thresholds)
    return (
        f'<div class="score"><h3>{safe(name)}</h3><div class="strip">{" ".join(facts)}</div>'
        f"{chart.chart(values, out, thresholds)}{chart.share_table(values)}"
        f"{strips or _along(choice.looked_at.numbers[name], findings)}</div>\n"
    )


def _beside(threshold: Threshold, looked_at: Values, findings: Findings) -> str:
    """The pictures nearest to a threshold, on both sides of it."""
    values = looked_at.numbers[threshold.of]
    shown = [place for place in _ascending(values, findings) if findings.pictures[place].jpeg]
    at = np.searchsorted(values[shown], threshold.number, side="left" if threshold.op in (">=", "<") else "right")
    sides = (shown[max(int(at) - BESIDE, 0) : int(at)], shown[int(at) : int(at) + BESIDE])
    words = ("left out", "kept") if threshold.op.startswith(">") else ("kept", "left out")
    if not any(sides):
        return ""
    halves = [_strip([(findings.pictures[place], values[place]) for place in side]) for side in sides]
    middle = (
        f'<span class="side">{words[0]} | {words[1]}<br>{safe(threshold.op)} {chart.number(threshold.number)}</span>'
    )
    return f'<div class="strip">{halves[0]}{middle}{halves[1]}</div>'


def _along(values: np.ndarray, findings: Findings) -> str:
    """Pictures from the lowest value to the highest, at even ranks."""
    shown = [place for place in _ascending(values, findings) if findings.pictures[place].jpeg]
    if not shown or values[shown[0]] == values[shown[-1]]:
        return ""
    ranks = np.unique(np.linspace(0, len(shown) - 1, ALONG).round().astype(int)).tolist()
    return f'<div class="strip">{_strip([(findings.pictures[shown[i]], values[shown[i]]) for i in ranks])}</div>'


def _ascending(values: np.ndarray, findings: Findings) -> list[int]:
    """The places of the samples with a picture and a value, by their values."""
    places = np.array([place for place in findings.pictures if not np.isnan(values[place])], int)
    return places[np.argsort(values[places], kind="stable")].tolist()


def _strip(pictures: Sequence[tuple[Picture, float]]) -> str:
    return "".join(
        f"<figure>{picture(one.jpeg, 'jpeg')}"
        f'<figcaption class="quiet">{chart.number(float(value))}</figcaption></figure>'
        for one, value in pictures
    )
