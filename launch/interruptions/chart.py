"""The picture of the simulated runs: the share over the save interval, and the hours lost by cause."""

from pathlib import Path

import matplotlib.pyplot as plt

from launch.interruptions import young_daly
from launch.interruptions.events import BEGIN, LIMIT, PARTS, Life
from launch.interruptions.from_plan import with_faults
from launch.interruptions.options import COMPARED, KINDS, LifetimeOptions
from launch.interruptions.page import AIM, Runs, by_interval
from train.monitor.plots import save_figure

PART_NAMES = {"end": "end of ranks", "wait": "in the queue", "start": "start", "redo": "steps redone"}


def draw(life: Life, options: LifetimeOptions, path: Path) -> None:
    """Draw it into a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for rate in COMPARED:
        at = by_interval(with_faults(life, options, rate), options)
        minutes = [runs.life.save_every * life.step / 60 for runs in at]
        spread = [[abs(runs.share - edge) for runs in at for edge in runs.spread[side : side + 1]] for side in (0, 1)]
        (line, *_) = left.errorbar(minutes, [r.share for r in at], spread, marker="o", capsize=3, label=f"{rate:g}")
        closed = [young_daly.share(runs.life) for runs in at]
        left.plot(minutes, closed, "--", color=line.get_color(), alpha=0.6)
    left.axhline(AIM, color="grey", linewidth=0.8)
    left.axvline(life.save_every * life.step / 60, color="grey", linestyle=":")
    left.set(xscale="log", xlabel="minutes between saves (dotted: as configured)", ylabel="effective training time")
    left.legend(title="faults per 1,000 node-days\n(dashed: closed form)", loc="lower left")
    left.grid(alpha=0.3)

    runs, causes = Runs.of(life, options), (*KINDS, LIMIT, BEGIN)
    so_far = [0.0] * len(causes)
    for part in PARTS:
        hours = [runs.lost(cause, part) for cause in causes]
        right.bar(causes, hours, bottom=so_far, label=PART_NAMES[part])
        so_far = [a + b for a, b in zip(so_far, hours, strict=True)]
    right.set(
        ylim=(0, 1.05 * max(so_far)),
        ylabel="GPU-hours lost",
        title=f"{sum(options.rates.values()):g} faults per 1,000 node-days",
    )
    right.tick_params(axis="x", rotation=20)
    right.legend()
    save_figure(figure, path)
