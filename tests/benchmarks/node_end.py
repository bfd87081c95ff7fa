"""Seconds from the death of a rank to the end of its node's launcher: `python -m tests.benchmarks.node_end`.

Without the watch of train/faults/node_watch.py the ranks are those of DeepSpeed's launcher alone: 8 take minutes.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.cli import command
from tests.support.trainings import free_port

HANGING = Path(__file__).resolve().parent.parent / "support" / "hanging_rank.py"
DYING_LINE = "this rank's own error"


@dataclass
class NodeEnd:
    """Measures how long a node takes to end after one of its ranks has died, the others hanging.

    ranks: of the node.
    repeats: of each; the median is printed.
    """

    ranks: int = 8
    repeats: int = 1


def seconds_to_end(ranks: int, *arguments: str) -> float:
    """From the line with which the dying rank says why, to the launcher's end."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", str(ranks)]
    program = [*launcher, "--master_port", str(free_port()), str(HANGING), *arguments]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if DYING_LINE in line:
                break
        began = time.perf_counter()
        process.stderr.read()
        process.wait()
        return time.perf_counter() - began


def measure(args: NodeEnd) -> None:
    """Print the table."""
    print(f"| {args.ranks} ranks, of which one dies and | launcher alone, s | with the watch, s |\n|---|---:|---:|")
    for mode, words in (("sleep", "all others hang"), ("lock", "all others hang, all but one with the lock held")):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats):
            for watch, found in seconds.items():
                found.append(seconds_to_end(args.ranks, mode, *(["watch"] if watch else [])))
        alone, watched = (statistics.median(found) for found in seconds.values())
        print(f"| {words} | {alone:.0f} | {watched:.0f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, NodeEnd, argv)


if __name__ == "__main__":
    main()
