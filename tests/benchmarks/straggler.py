"""Whether a rank that is a fifth slower is named: `python -m tests.benchmarks.straggler work=SCRATCH`.

A real training of several ranks, in which first none of them is slowed (tests/support/slowed.py), then each in turn.
What else the cores do adds scatter, which the turns without a slowed rank show.
"""

import json
import os
import random
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.cli import command, location
from tests.chaos import Run, ask_a_rank
from tests.support.slowed import slowed
from tests.support.trainings import make_data, metrics
from train.monitor.phases import OWN
from train.monitor.stragglers import LINES

NET = ("model.image_size=32", "model.channel_mult=[1,2]", "model.attention_resolutions=[16]", "save_every=1000000")


@dataclass
class Straggler:
    """Measures whether a slowed rank is named.

    work: a scratch folder.
    ranks: of the training.
    slower: share by which a rank is slowed.
    log_every: steps of a line; an alert needs five lines with a minute of a rank's own time.
    lines: that a turn has beyond the first five, in which the slowed rank changes.
    rounds: of all turns.
    """

    work: str = location()
    ranks: int = 2
    slower: float = 0.2
    log_every: int = 40
    lines: int = 3
    rounds: int = 2


def lines_of_turn(run: Run, process: psutil.Process | None, args: Straggler) -> tuple[list[dict], list[str]]:
    """The lines of a turn after its first LINES, whose median is of this turn alone; and the alerts."""
    there, said = len(metrics(run.run_dir)), len(run.said())
    with slowed(process, args.slower) if process else nullcontext():
        # A line is under way as the turn begins.
        while len(metrics(run.run_dir)) < there + 1 + LINES + args.lines:
            assert run.process.poll() is None, run.said()[-3000:]
            time.sleep(0.5)
    alerts = [line for line in run.said()[said:].splitlines() if "ALERT straggler" in line]
    return metrics(run.run_dir)[there + LINES :][-args.lines - 1 :], alerts


def measure(args: Straggler) -> None:
    """Print a line for each turn."""
    data, run_dir = Path(args.work) / "data", Path(args.work) / f"run-{time.time():.0f}"
    if not data.exists():
        make_data(data)
    own = (f"log_every={args.log_every}", f"global_batch={8 * args.ranks}", "micro_batch=4", "steps=1000000")
    run = Run(data, run_dir, *NET, *own, "check_every=0", ranks=args.ranks)
    run.wait_for(2 * args.log_every, patience=1800.0)
    ranks = run.ranks()
    print("| slowed | named, in lines | behind: median, lowest to highest | data | forward | backward | alert |")
    print("|---|---|---:|---:|---:|---:|---|")
    for turn in [None, *range(args.ranks)] * args.rounds:
        lines, alerts = lines_of_turn(run, None if turn is None else ranks[turn], args)
        named = Counter(int(line["straggler_rank"]) for line in lines).most_common()
        behind = [line["straggler_behind"] for line in lines]
        by_phase = (statistics.median(line[f"straggler_{phase}"] for line in lines) for phase in OWN)
        cells = [
            "none" if turn is None else f"rank {turn}",
            ", ".join(f"rank {rank}: {times}" for rank, times in named),
            f"{statistics.median(behind):.0%}, {min(behind):.0%} to {max(behind):.0%}",
            *(f"{share:.0%}" for share in by_phase),
            "; ".join(alert[alert.index("ALERT") :] for alert in alerts) or "-",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    tree = run.tree()
    ask_a_rank(run, random.Random(0))
    run.end(tree, patience=600.0)
    print(json.dumps({"lines": len(metrics(run_dir)), "load": os.getloadavg()}))


def main(argv: list[str] | None = None) -> None:
    command(measure, Straggler, argv)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
