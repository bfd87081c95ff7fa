"""Whether a rank that is a fifth slower is named: `python -m tests.benchmarks.straggler work=SCRATCH`.

A real training of several ranks, in which first none of them is slowed, then each in turn, first where it loads data
and then in the forward (tests/support/slowed_run.py). A slowed rank sleeps for a share of the time that it takes
itself, so what else its core does adds scatter and no bias; the turn without a slowed rank shows the scatter.
"""

import os
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.cli import command, location
from tests.support.slowed_run import turns_of
from tests.support.trainings import make_data, metrics, start
from train.monitor.phases import OWN
from train.monitor.stragglers import LINES

REPO = Path(__file__).resolve().parent.parent.parent
ALERT = re.compile(r"ALERT (straggler [^:]*): step (\d+): (.*);")


@dataclass
class Straggler:
    """Measures whether a slowed rank is named.

    work: a scratch folder.
    ranks: of the training.
    slower: share by which a rank is slowed.
    log_every: steps of a line; an alert needs five lines with a minute of a rank's own time.
    lines: that are read of a turn, after those whose median is of the turn before too; two or more.
    rounds: of all turns.
    """

    work: str = location()
    ranks: int = 2
    slower: float = 0.2
    log_every: int = 40
    lines: int = 3
    rounds: int = 1


def measure(args: Straggler) -> None:
    """Print a line for each turn."""
    data, run_dir = Path(args.work) / "data", Path(args.work) / f"run-{time.time():.0f}"
    if not data.exists():
        make_data(data)
    turns, of_turn = turns_of(args.ranks), LINES - 1 + args.lines
    own = {
        "log_every": args.log_every, "global_batch": 8 * args.ranks, "micro_batch": 4, "check_every": 0,
        "steps": args.log_every * of_turn * len(turns) * args.rounds, "save_every": 1_000_000,
    }  # fmt: skip
    slowed = {
        "script": REPO / "tests/support/slowed_run.py",
        "before": (str(args.slower), str(args.log_every * of_turn)),
    }
    overrides = (f"{name}={value}" for name, value in own.items())
    process = start(REPO, data, run_dir, *overrides, "wandb.mode=disabled", ranks=args.ranks, **slowed)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    lines, alerts = metrics(run_dir), ALERT.findall(errors)
    print("| slowed | named, in lines | behind: median, lowest to highest | data | forward | backward | alerts |")
    print("|---|---|---:|---:|---:|---:|---|")
    for number, (rank, phase) in enumerate(turns * args.rounds):
        # The first line of a start has no place in a median.
        first, last = number * of_turn + LINES - 1 + (not number), (number + 1) * of_turn
        shown = lines[first:last]
        named = Counter(int(line["straggler_rank"]) for line in shown).most_common()
        behind = [line["straggler_behind"] for line in shown]
        by_phase = (statistics.median(line[f"straggler_{name}"] for line in shown) for name in OWN)
        # Where it is told already, it is not told again.
        told = [
            f"{who}: {what}" for who, step, what in alerts if number == (int(step) - 1) // (args.log_every * of_turn)
        ]
        cells = [
            f"rank {rank}, {phase}" if phase else "none",
            ", ".join(f"rank {other}: {times}" for other, times in named),
            f"{statistics.median(behind):.0%}, {min(behind):.0%} to {max(behind):.0%}",
            *(f"{share:.0%}" for share in by_phase),
            "; ".join(told) or "-",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"{statistics.median(line['seconds_forward'] for line in lines):.2f} s a step in the forward")


def main(argv: list[str] | None = None) -> None:
    command(measure, Straggler, argv)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
