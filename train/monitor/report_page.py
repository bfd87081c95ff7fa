"""The HTML page of train.report: curves drawn by plotly, sample grids with a slider, configurations, starts."""

import base64
import json
import math
from html import escape

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.offline import get_plotlyjs

from train.checkpoint.changes import describe_changes, flatten
from train.monitor.film import FRAMES, film, spread
from train.monitor.run_log import Run

# Title, metrics, and whether the axis is logarithmic.
CURVES = (
    ("Loss", ("loss", "loss_smoothed"), True),
    ("Loss by part, and on held-out samples", ("mse", "vb", "validation/mse"), True),
    ("Squared error by quarter of t (q0: least noise)", ("mse_q0", "mse_q1", "mse_q2", "mse_q3"), True),
    (
        "Error of the mean colour by quarter of t (1: not predicted)",
        ("mse_mean_q0", "mse_mean_q1", "mse_mean_q2", "mse_mean_q3"),
        True,
    ),
    (
        "Squared error on held-out samples by timestep (e0: least noise)",
        tuple(f"validation/mse_e{i}" for i in range(8)),
        True,
    ),
    ("Learning rate", ("lr",), False),
    ("Norm of the gradient, before clipping", ("grad_norm",), True),
    ("Share of steps clipped", ("grad_clipped_share",), False),
    ("Update / weights", ("update_to_weight",), True),
    ("Distance of the average from the weights", ("ema_distance",), True),
    ("Images a second, all GPUs", ("images_per_second",), False),
    ("Images a second and GPU", ("images_per_second_per_gpu",), False),
    ("MFU", ("mfu",), False),
    (
        "Seconds a step, by phase",
        (
            "seconds_data",
            "seconds_forward",
            "seconds_backward",
            "seconds_step",
            "seconds_save",
            "seconds_sample",
            "seconds_validate",
        ),
        False,
    ),
    (
        "Slowest rank: share of its own time behind the median, by phase",
        ("straggler_behind", "straggler_data", "straggler_forward", "straggler_backward"),
        False,
    ),
    ("Memory, GB", ("memory_gb",), False),
    ("Bad samples and skipped steps of each line", ("bad_samples", "skipped_steps"), False),
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Most points of a curve: a run of 2,420,000 steps has 48,400 lines.
POINTS = 4000
# Most sample grids of a run, spread evenly over its steps: each adds some hundred kilobytes to the page.
GRIDS = 60

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: .5rem; }
.plot { height: 360px; } .side { display: flex; gap: 2rem; flex-wrap: wrap; align-items: flex-start; }
.side > div { flex: 1 1 420px; min-width: 0; } .grids img { max-width: 100%; image-rendering: pixelated; }
input[type=range] { width: 100%; } .warn { background: #fff3cd; padding: .5rem 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top; }
tr + tr > * { border-top: 1px solid #8884; } .differs { background: #fff3cd; } .quiet { color: #777; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; } pre { font-size: 12px; white-space: pre-wrap; }
"""
# Draws the figures, which the page holds as JSON, and lets the sliders choose a grid.
SCRIPT = """
for (const figure of JSON.parse(document.getElementById("figures").textContent))
  Plotly.newPlot(figure.id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
for (const box of document.querySelectorAll(".grids")) {
  const shown = [...box.querySelectorAll("figure")], slider = box.querySelector("input");
  const show = () => shown.forEach((figure, i) => { figure.hidden = i !== Number(slider.value); });
  slider.addEventListener("input", show);
  show();
}
"""


def page(runs: list[Run]) -> str:
    """The page of some runs, as HTML. Every string that comes from a run is escaped."""
    figures = [figure for i, curve in enumerate(CURVES) if (figure := _figure(f"curve-{i}", *curve, runs))]
    plots = "".join(f'<div class="plot" id="{figure["id"]}"></div>' for figure in figures)
    title = ", ".join(run.name for run in runs)
    warnings = "".join(f'<p class="warn">{escape(w)}</p>' for run in runs for w in run.warnings)
    # "<" as an escape, so that nothing in the data can end the script's element.
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        # The page holds all that it needs. The policy forbids any fetch, also by a hostile caption.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data: blob:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>{warnings}{_summary(runs)}\n<h2>Curves</h2>"
        '<p class="quiet">Dashed lines across are starts of the run. A click on a name in a legend hides it, a '
        "double click all others; drag to zoom, double click to see all.</p>"
        f'<div class="plots">{plots}</div>\n{_grids(runs)}\n{_selections(runs)}\n{_recipes(runs)}\n{_starts(runs)}\n'
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _figure(name: str, title: str, metrics: tuple[str, ...], log: bool, runs: list[Run]) -> dict | None:
    """A curve for each metric and run, and a line at each later start; None if no run logged any of the metrics."""
    figure = go.Figure()
    colours = qualitative.Plotly
    for r, run in enumerate(runs):
        for m, metric in enumerate(metrics):
            steps, values = _curve(run.lines, metric)
            if not steps:
                continue
            label = metric if len(runs) == 1 else f"{run.name}: {metric}" if len(metrics) > 1 else run.name
            # Colours tell runs apart and dashes metrics; with one run alone, colours tell the metrics apart.
            line = {"color": colours[(m if len(runs) == 1 else r) % len(colours)], "width": 1.6,
                    "dash": "solid" if len(runs) == 1 else DASHES[m % len(DASHES)]}  # fmt: skip
            faint = 0.4 if metric == "loss" and "loss_smoothed" in metrics else 1.0
            figure.add_scatter(x=steps, y=values, name=escape(label), mode="lines", line=line, opacity=faint)
        for start in run.starts[1:]:
            figure.add_vline(x=start.get("step", 0), line={"color": "#999", "width": 1, "dash": "dash"})
    if not figure.data:
        return None
    figure.update_layout(
        title=title, template="plotly_white", margin={"l": 60, "r": 10, "t": 40, "b": 45}, showlegend=True,
        legend={"orientation": "h", "y": -0.28, "font": {"size": 11}}, xaxis_title="step",
        yaxis={"type": "log" if log else "linear", "exponentformat": "e"},
    )  # fmt: skip
    plain = json.loads(figure.to_json(remove_uids=True, engine="json"))
    return {"id": name, "data": plain["data"], "layout": plain["layout"]}


def _curve(lines: list[dict], metric: str) -> tuple[list[int], list[float | None]]:
    """Steps and values, thinned to POINTS by taking means; a value is None where none of those is finite."""
    found = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), (int, float))]
    size = max(1, math.ceil(len(found) / POINTS))
    steps, values = [], []
    for i in range(0, len(found), size):
        part = [value for _, value in found[i : i + size] if math.isfinite(value)]
        steps.append(found[min(i + size, len(found)) - 1][0])
        values.append(sum(part) / len(part) if part else None)
    return steps, values


def _summary(runs: list[Run]) -> str:
    """The state of the runs, side by side."""

    def total(run: Run, name: str) -> str:
        return f"{sum(line.get(name) or 0 for line in run.lines):,.0f}"

    rows = {
        "step": [f"{run.lines[-1]['step']:,}" for run in runs],
        "loss, smoothed": [_number(run.lines[-1], "loss_smoothed", "loss") for run in runs],
        "validation mse": [_last(run.lines, "validation/mse") for run in runs],
        "lowest validation mse": [_lowest(run.lines, "validation/mse") for run in runs],
        "lowest loss of a line": [_lowest(run.lines, "loss") for run in runs],
        "images per second": [_number(run.lines[-1], "images_per_second") for run in runs],
        "MFU": [_number(run.lines[-1], "mfu") for run in runs],
        "slowest rank": [_straggler(run.lines[-1]) for run in runs],
        "bad samples": [total(run, "bad_samples") for run in runs],
        "steps skipped": [total(run, "skipped_steps") for run in runs],
        "starts": [f"{max(len(run.starts), 1)}" for run in runs],
    }
    return _table([run.name for run in runs], rows)


def _value(line: dict, name: str) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.inf


def _lowest(lines: list[dict], name: str) -> str:
    value = min(_value(line, name) for line in lines)
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _last(lines: list[dict], name: str) -> str:
    """The value of the last line that has it."""
    return next((_number(line, name) for line in reversed(lines) if name in line), "-")


def _number(line: dict, *names: str) -> str:
    for name in names:
        if isinstance(line.get(name), (int, float)):
            return f"{line[name]:.4g}"
    return "-"


def _straggler(line: dict) -> str:
    if "straggler_node" not in line:
        return "-"
    behind, place = _number(line, "straggler_behind"), f"{line['straggler_node']} GPU {line.get('straggler_gpu')}"
    return f"{place}, {behind} of its own time behind the median"


def _table(heads: list[str], rows: dict[str, list[str]], mark: bool = False) -> str:
    """mark: highlight rows whose cells differ."""
    body = "".join(
        f"<tr{' class=differs' if mark and len(set(cells)) > 1 else ''}><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f"<table><tr><th></th>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{body}</table>"


def _grids(runs: list[Run]) -> str:
    """The sample grids of each run; a slider chooses the one that is shown, and a film shows one after the other."""
    boxes = []
    for run in runs:
        if not run.grids:
            continue
        last = min(len(run.grids), GRIDS) - 1
        grids = [(step, path.read_bytes()) for step, path in (run.grids[i] for i in spread(len(run.grids), GRIDS))]
        figures = "".join(
            f'<figure hidden><img alt="samples of step {step}" src="data:image/png;base64,'
            f'{base64.b64encode(data).decode("ascii")}"><figcaption>step {step:,}</figcaption></figure>'
            for step, data in grids
        )
        boxes.append(
            f'<div class="grids"><b>{escape(run.name)}</b>, {len(grids)} of {len(run.grids)} grids'
            f'<input type="range" min="0" max="{last}" value="{last}" '
            f'aria-label="which of {last + 1} grids">{figures}{_film(grids)}</div>'
        )
    return f'<h2>Samples</h2><div class="side">{"".join(boxes)}</div>' if boxes else "<h2>Samples</h2><p>None yet.</p>"


def _film(grids: list[tuple[int, bytes]]) -> str:
    """Some of the grids, of even distance, as a GIF."""
    chosen = [grids[i] for i in spread(len(grids), FRAMES)]
    gif, frames = film([data for _, data in chosen])
    if not gif:
        return ""
    bad = f", {len(chosen) - frames} damaged or too large" if frames < len(chosen) else ""
    return (
        f"<details><summary>As a film: {frames} grids from step {chosen[0][0]:,} to {chosen[-1][0]:,}{bad} "
        f"({len(gif) / 1e6:.1f} MB)</summary>"
        f'<img alt="the grids as a film" src="data:image/gif;base64,{base64.b64encode(gif).decode("ascii")}"></details>'
    )


def _selections(runs: list[Run]) -> str:
    """What the rules of each run left out of its data, as of its last start."""
    parts = []
    for run in runs:
        for number, selection in enumerate(run.starts[-1].get("selections") or [] if run.starts else []):
            if selection:
                lines = "".join(f"<li>{escape(str(line))}</li>" for line in selection["receipt"])
                parts.append(f"<p>{escape(run.name)}, dataset {number + 1}</p><ul>{lines}</ul>")
    return f"<h2>Samples chosen</h2>{''.join(parts)}" if parts else ""


def _recipes(runs: list[Run]) -> str:
    """The configuration of each run with its changes; with several runs, what differs comes first, highlighted."""
    recipes = [_recipe(run) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    rows = {key: [recipe.get(key, "-") for recipe in recipes] for key in keys}
    differing = {key: cells for key, cells in rows.items() if len(set(cells)) > 1}
    names = [run.name for run in runs]
    first = f"<p>What differs:</p>{_table(names, differing, mark=True)}" if differing else ""
    all_keys = (
        f"<details{'' if first else ' open'}><summary>All of it</summary>{_table(names, rows, mark=True)}</details>"
    )
    changes = "".join(_changes(run) for run in runs)
    return f"<h2>Recipe, as run</h2>{changes}{first}{all_keys if rows else '<p>Not recorded.</p>'}"


def _recipe(run: Run) -> dict[str, str]:
    """The values of the first step by key, each followed by what it was changed to on the way."""
    if not run.parts:
        return {}
    recipe = {key: str(value) for key, value in flatten(run.parts[0].recipe).items()}
    for part in run.parts[1:]:
        for key, (_, new) in part.changes.items():
            recipe[key] = f"{recipe.get(key, '-')}; from step {part.first_step:,} on: {'-' if new is None else new}"
    return recipe


def _changes(run: Run) -> str:
    """What changed on the way, a line for each start that changed something."""
    lines = "".join(
        f"<li>from step {part.first_step:,} on: {escape(describe_changes(part.changes))}</li>"
        for part in run.parts
        if part.changes
    )
    return f"<p>{escape(run.name)} changed on the way:</p><ul>{lines}</ul>" if lines else ""


def _starts(runs: list[Run]) -> str:
    """The time, first step, command line, code and machine of each start."""
    parts = []
    for run in runs:
        for start in run.starts:
            rest = {
                key: value
                for key, value in start.items()
                if key not in ("config", "launch", "selections", "step", "time")
            }
            head = f"{run.name}: {start.get('time')}, from step {start.get('step')}: "
            line = " ".join(map(str, start.get("launch", [])))
            parts.append(
                f"<details><summary>{escape(head)}<code>{escape(line)}</code></summary>"
                f"<pre>{escape(json.dumps(rest, indent=1))}</pre></details>"
            )
    return f"<h2>Starts</h2>{''.join(parts) or '<p>Not recorded.</p>'}"
