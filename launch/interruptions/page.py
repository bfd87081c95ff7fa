"""The simulated runs as a page of plain text."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from launch.cost.page import row
from launch.interruptions import young_daly
from launch.interruptions.events import BEGIN, LIMIT, PARTS, Life, NeverEnds, Outcome, shares, simulate_runs
from launch.interruptions.from_plan import DAY, with_faults
from launch.interruptions.options import COMPARED, KINDS, LifetimeOptions

AIM = 0.97
# Multiples of save_every that are compared.
MULTIPLES = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
WIDE = 15
cells = partial(row, width=WIDE)


@dataclass(frozen=True, slots=True)
class Runs:
    """The simulated runs of one life, and what is read of them."""

    life: Life
    options: LifetimeOptions
    outcomes: list[Outcome]

    @classmethod
    def of(cls, life: Life, options: LifetimeOptions) -> "Runs":
        """Simulate them; none if they never end."""
        try:
            return cls(life, options, simulate_runs(life, options.runs))
        except NeverEnds:
            return cls(life, options, [])

    @property
    def share(self) -> float:
        """Effective training time, the mean of the runs; 0 if they never end."""
        if not self.outcomes:
            return 0.0
        return float(shares(self.life, self.outcomes).mean())

    @property
    def spread(self) -> tuple[float, float]:
        """From the 5th to the 95th of 100 runs."""
        if not self.outcomes:
            return 0.0, 0.0
        low, high = np.percentile(shares(self.life, self.outcomes), [5, 95])
        return float(low), float(high)

    def mean(self, value: str) -> float:
        """The mean over the runs of an attribute of Outcome."""
        return sum(getattr(outcome, value) for outcome in self.outcomes) / len(self.outcomes)

    @property
    def faults(self) -> float:
        return sum(sum(outcome.faults.values()) for outcome in self.outcomes) / len(self.outcomes)

    def lost(self, cause: str, part: str) -> float:
        """GPU-hours lost in a run on average, those of the queue included, in which others have the nodes."""
        seconds = sum(outcome.lost[cause, part] for outcome in self.outcomes) / len(self.outcomes)
        return seconds * self.gpus / 3600

    @property
    def gpus(self) -> int:
        """That train; spares are no part of them."""
        return self.options.nodes * self.options.gpus_per_node

    @property
    def spare_hours(self) -> float:
        """GPU-hours of the spare nodes, from the first start to the end but for the queue."""
        held = self.mean("seconds") - self.mean("waited")
        return held * self.options.spares * self.options.gpus_per_node / 3600

    @property
    def lost_in_all(self) -> float:
        """GPU-hours, saves and the queue included, spares not."""
        return (self.mean("seconds") - self.life.steps * self.life.step) * self.gpus / 3600


def render(life: Life, options: LifetimeOptions, sizes: str) -> str:
    """The page: share by rate of faults, hours by cause, save_every, what would change it, what was assumed.

    sizes: which sizes of the configuration follow the data, in a line; '' for none.
    """
    runs = Runs(life, options, simulate_runs(life, options.runs))
    parts = (
        head(runs) + [sizes] * bool(sizes),
        rates(runs),
        causes(runs),
        intervals(runs),
        changes(runs),
        assumptions(runs),
    )
    return "\n\n".join("\n".join(lines) for lines in parts)


def percent(share: float) -> str:
    return f"{share:.2%}" if share else "-"


def head(runs: Runs) -> list[str]:
    """The run."""
    life, options = runs.life, runs.options
    days = life.steps * life.step / DAY
    source = "step_seconds" if options.step_seconds else "launch.plan"
    return [
        f"{life.steps:,} steps of {life.step:.3f} s ({source}) on {options.nodes} nodes x {options.gpus_per_node} "
        f"GPUs: {days:.1f} days without faults; save_every={life.save_every:,} is "
        f"{life.save_every * life.step / 60:.1f} min",
        f"restart={options.restart}, spares={options.spares}; means of {len(runs.outcomes)} runs",
    ]


def rates(runs: Runs) -> list[str]:
    """The share at each rate of faults, beside the closed form, and whether it is enough."""
    given = round(sum(runs.options.rates.values()), 6)
    titles = ("share", "5 to 95 %", "closed form", "days", "faults", "requeues", "steps redone", "GPU-hours lost")
    lines = [cells("FAULTS PER 1,000 NODE-DAYS", *titles)]
    for rate in sorted({*COMPARED, given}):
        at = runs if rate == given else Runs.of(with_faults(runs.life, runs.options, rate), runs.options)
        name = f"{rate:g}, a fault every {1 / at.life.rate / 3600:,.1f} h"
        if not at.outcomes:
            lines.append(cells(name, "-", "", percent(young_daly.share(at.life)), "never ends"))
            continue
        low, high = at.spread
        lines.append(
            cells(
                name, percent(at.share), f"{low:.1%}-{high:.1%}", percent(young_daly.share(at.life)),
                f"{at.mean('seconds') / DAY:.2f}", f"{at.faults:.1f}", f"{at.mean('requeues'):.1f}",
                f"{at.mean('redone'):,.0f}", f"{at.lost_in_all:,.0f}",
            )
        )  # fmt: skip
        lines += missed(at) if at.share < AIM else []
    return lines


def missed(runs: Runs) -> list[str]:
    """What stands in the way of the aim: the largest causes."""
    hours = {cause: sum(runs.lost(cause, part) for part in PARTS) for cause in (*KINDS, LIMIT, BEGIN)}
    largest = sorted(hours, key=lambda cause: -hours[cause])[:2]
    named = ", ".join(f"{cause} {hours[cause] / runs.lost_in_all:.0%} of what is lost" for cause in largest)
    return [f"  below {AIM:.0%}: {named}"]


def causes(runs: Runs) -> list[str]:
    """GPU-hours lost by cause and part, at the rates of the options."""
    titles = ("end of ranks", "in the queue", "start", "steps redone", "in all", "of the time")
    lines = [cells("GPU-HOURS LOST BY CAUSE", *titles)]
    total = runs.mean("seconds") * runs.gpus / 3600
    for cause in (*KINDS, LIMIT, BEGIN):
        hours = [runs.lost(cause, part) for part in PARTS]
        number = sum(outcome.faults[cause] for outcome in runs.outcomes) / len(runs.outcomes)
        name = f"{cause}, {number:.1f} times" if cause in KINDS else cause
        lines.append(cells(name, *(f"{h:,.1f}" for h in hours), f"{sum(hours):,.1f}", percent(sum(hours) / total)))
    saving = runs.mean("saving") * runs.gpus / 3600
    lines.append(cells("saves", "", "", "", "", f"{saving:,.1f}", percent(saving / total)))
    spare = f"{runs.spare_hours:,.0f}"
    return [*lines, cells("spares, waiting or at work", "", "", "", "", spare, "beside it")]


def intervals(runs: Runs) -> list[str]:
    """The share by save_every, and the best."""
    lines = [cells("SAVE_EVERY", "minutes", "share", "closed form", "steps redone")]
    compared = by_interval(runs.life, runs.options)
    for at in compared:
        every = at.life.save_every
        minutes = f"{every * at.life.step / 60:.1f}"
        name = f"{every:,}" + (", as configured" if every == runs.life.save_every else "")
        redone = f"{at.mean('redone'):,.0f}" if at.outcomes else "-"
        found = (percent(at.share), percent(young_daly.share(at.life)), redone)
        lines.append(cells(name, minutes, *found))
    best = max(compared, key=lambda at: at.share)
    return [
        *lines,
        f"best of these: save_every={best.life.save_every:,}; Young {young_daly.young(runs.life):,.0f}, "
        f"Daly {young_daly.daly(runs.life):,.0f} (they see the copy of a save, not the time to write it)",
    ]


def by_interval(life: Life, options: LifetimeOptions) -> list[Runs]:
    """The runs with other values of save_every, the configured one among them."""
    every = sorted({max(1, round(multiple * life.save_every)) for multiple in MULTIPLES})
    return [Runs.of(replace(life, save_every=steps), options) for steps in every if steps <= life.steps]


def changes(runs: Runs) -> list[str]:
    """What another setup would give, at the rates of the options and at the highest."""
    highest = max(COMPARED)
    lines = [cells("WHAT WOULD CHANGE IT", "share", f"at {highest:g}")]
    for name, change in variants(runs.life).items():
        life = replace(runs.life, **change)
        both = (life, with_faults(life, runs.options, highest))
        lines.append(cells(name, *(percent(Runs.of(at, runs.options).share) for at in both)))
    return lines


def variants(life: Life) -> dict[str, dict]:
    """Other setups, by what is changed."""
    others: dict[str, dict] = {
        "as it is": {},
        "requeue after each fault": {"in_place": False},
        "in place, no spare": {"in_place": True, "spares": 0},
        "in place, 1 spare": {"in_place": True, "spares": 1},
        "in place, 2 spares": {"in_place": True, "spares": 2},
        "compile cache on all nodes": {"shared_cache": True},
        "each node compiles by itself": {"shared_cache": False},
        "no time limit of the job": {"job": 0.0},
        "no time limit, 2 spares": {"in_place": True, "spares": 2, "shared_cache": True, "job": 0.0},
        "a copy in memory every 50 steps": {"memory_every": 50},
    }
    same = [name for name, change in others.items() if change and replace(life, **change) == life]
    return {name: change for name, change in others.items() if name not in same}


def assumptions(runs: Runs) -> list[str]:
    """Where the numbers come from."""
    options, life = runs.options, runs.life
    return [
        "ASSUMED",
        f"  faults: {', '.join(f'{name} {rate:g}' for name, rate in options.rates.items())} per 1,000 node-days; "
        "6.5 of Kokolis et al. 2024, shared out",
        "  as the interruptions of Llama 3 (2024). They come at random, one by one, each node as often as the others",
        f"  detect_seconds={options.detect_seconds:g}, start_seconds={options.start_seconds:g}, compile_seconds="
        f"{options.compile_seconds:g}, cached_share={options.cached_share:g}: docs/measurements/lifetime.md; "
        f"hang_seconds={life.hang:g}",
        f"  storage={options.storage:g} GB/s: {life.write:.1f} s to write a checkpoint, {life.load:.1f} s to check and "
        f"read one; host_copy={options.host_copy:g} GB/s:",
        f"  {life.copy * 1000:.0f} ms of a rank's part. queue_minutes={options.queue_minutes:g} and Slurm's 2, "
        f"job_hours={options.job_hours:g}",
        "  A requeued job may get other nodes, and a spare has an empty cache of torch.compile unless "
        "shared_compile_cache=true",
        "  GPU-hours in the queue are of nodes that others may use meanwhile",
    ]
