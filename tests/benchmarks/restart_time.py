"""Seconds from the SIGKILL of a rank to the next step of the next start, by phase: `... restart_time work=SCRATCH`.

The ranks are those of DeepSpeed's launcher on this machine; the next start follows at once, as that of the batch script
in its own job does (launch/slurm/in_place.py).
"""

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.cli import command, location
from tests.support.trainings import make_data, metrics, rank_processes, start, starts_of

REPO = Path(__file__).resolve().parent.parent.parent
OVERRIDES = ("steps=100000", "save_every=10", "wandb.mode=disabled")
PHASES = (
    "all ranks have ended",
    "the launcher has ended",
    "the next ranks run",
    "the checkpoint is loaded",
    "the next step is made",
)


@dataclass
class RestartTime:
    """Measures the way from the SIGKILL of a rank to the next step.

    work: a scratch folder; a run that lies there is deleted.
    ranks: of the training.
    repeats: kills; the median is printed.
    compiled: with compile=true, whose cache the first start fills.
    """

    work: str = location()
    ranks: int = 2
    repeats: int = 3
    compiled: bool = False


class Start:
    """One start of the training, its output in a file."""

    def __init__(self, data: Path, run_dir: Path, log: Path, *overrides: str, ranks: int) -> None:
        self.run_dir, self.log, self.began = run_dir, log, time.time()
        self._starts_before = len(starts_of(run_dir))
        with open(log, "w") as out:
            self.process = start(REPO, data, run_dir, *OVERRIDES, *overrides, ranks=ranks, stdout=out, stderr=out)

    def ranks(self) -> list[psutil.Process]:
        """Its processes that train, by rank."""
        return rank_processes(self.process)

    def said(self, pattern: str) -> bool:
        return bool(re.search(pattern, self.log.read_text(errors="replace")))

    def steps(self) -> int:
        """Of the last line of the metrics, once this start has begun to write it; 0 before."""
        if len(starts_of(self.run_dir)) == self._starts_before:
            return 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            return metrics(self.run_dir)[-1]["step"]
        return 0

    def wait_for(self, ready, seconds: float = 900) -> float:
        """Until it is so; the time then."""
        until = time.time() + seconds
        while not ready():
            assert time.time() < until and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return time.time()


def one_kill(args: RestartTime, data: Path, run_dir: Path, first: Start, *overrides: str) -> tuple[list[float], Start]:
    """Kill the last rank of a start, and start again: seconds from the kill to the end of each phase; the new start."""
    ranks, there = first.ranks(), first.steps()
    first.wait_for(lambda: first.steps() >= there + 15)
    killed = time.time()
    ranks[-1].kill()
    _, alive = psutil.wait_procs(ranks, timeout=300)
    assert not alive
    ends = [time.time()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.process.wait(timeout=300)
    ends.append(time.time())
    again = Start(data, run_dir, run_dir.parent / "again.log", *overrides, ranks=args.ranks)
    again.wait_for(lambda: len(again.ranks()) == args.ranks)
    ends.append(max(rank.create_time() for rank in again.ranks()))
    ends.append(again.wait_for(lambda: again.said("resumes from step")))
    kept = int(re.findall(r"resumes from step (\d+)", again.log.read_text())[-1])
    ends.append(again.wait_for(lambda: again.steps() > kept))
    return [end - killed for end in ends], again


def measure(args: RestartTime) -> None:
    """Print the table."""
    work = Path(args.work)
    data, run_dir = work / "data", work / "run"
    if not data.exists():
        make_data(data)
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [f"compile={str(args.compiled).lower()}", f"global_batch={4 * args.ranks}"]
    current = Start(data, run_dir, work / "first.log", *overrides, ranks=args.ranks)
    try:
        print(f"first start: step 1 after {current.wait_for(lambda: current.steps() > 0) - current.began:.1f} s")
        found = []
        for _ in range(args.repeats):
            ends, current = one_kill(args, data, run_dir, current, *overrides)
            found.append(ends)
    finally:
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(current.process.pid).children(recursive=True)
            for process in [*tree, psutil.Process(current.process.pid)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
    print(f"| {args.ranks} ranks, of which one is killed | s, median | s since the phase before |\n|---|---:|---:|")
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    for name, since, before in zip(PHASES, medians, [0.0, *medians], strict=False):
        print(f"| {name} | {since:.1f} | {since - before:.1f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, RestartTime, argv)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
