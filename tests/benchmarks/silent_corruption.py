"""Bits flipped on one rank: what finds them, and after how many steps. `python -m tests.benchmarks.silent_corruption`.

Prints a table of docs/measurements/corruption.md, and what the checks cost in processor time.
"""

import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data.cli import command, location
from tests.support.flipped_bits import BITS, CHECK_EVERY, SAVE_EVERY
from tests.support.trainings import make_data, run_ranks
from train.config import Config

REPO = Path(__file__).resolve().parent.parent.parent
# Pixels of the net whose cost is measured.
COST_SIZE = 32
# What is flipped, and the steps in which it begins.
WHAT = {
    "masters": (2,),
    "moments": (2,),
    "average": (2,),
    "checkpoint in host memory": (2,),
    "weights": (2, CHECK_EVERY),
    "gradient, once": (2,),
    "gradient, always": (2,),
    "activation, always": (2,),
    "pixels on the device, always": (2,),
    "pixels on the host, always": (2,),
}


@dataclass
class Corruption:
    """Trains with one bit flipped on the second rank, for each kind of bit and each place.

    work: a folder for the data and the runs; it is deleted first.
    ranks: of each training.
    """

    work: str = location("runs/silent-corruption")
    ranks: int = 2


def measure(args: Corruption) -> None:
    """Print the table: of the bits flipped in each place the share that is found, by which step, and who is named."""
    work = Path(args.work)
    shutil.rmtree(work, ignore_errors=True)
    make_data(work / "data")
    kinds = [(what, step) for what, steps in WHAT.items() for step in steps]
    cost = {"what": "none", "image_size": COST_SIZE}
    trials = [cost, {"what": "none"}, *({"what": w, "step": s, "bit": bit} for w, s in kinds for bit in BITS)]
    run_ranks(
        REPO, args.ranks, "-m", "tests.support.flipped_bits", str(work / "data"), str(work / "out"), json.dumps(trials),
        timeout=7200,
    )  # fmt: skip
    cost, none, *results = json.loads((work / "out").read_text())
    assert not cost["found"] and not none["found"], (cost, none)
    tell_cost(cost)
    print(f"{args.ranks} ranks, check_every={CHECK_EVERY}")
    tell_found(trials[2:], results, none["masters"])


def tell_found(trials: list[dict], results: list[dict], undisturbed: int) -> None:
    """Print a row for each place.  undisturbed: the checksum of the masters of a training without a flip."""
    rows = defaultdict(list)
    for trial, result in zip(trials, results, strict=True):
        rows[trial["what"], trial["step"]].append(result)
    print("| what is flipped | from step | found | ended in step | named | not found: masters differ at the end |")
    print("|---|---:|---:|---:|---|---:|")
    for (what, step), of_bits in rows.items():
        found = [result for result in of_bits if result["found"]]
        named = {", ".join(sorted(set(re.findall(r"rank (\d+)[ :]", result["said"])))) for result in found}
        unfound = [result for result in of_bits if not result["found"]]
        harmed = sum(result["masters"] != undisturbed for result in unfound)
        ends = sorted({str(result["found"]) for result in found})
        print(
            f"| {what} | {step} | {len(found)} of {len(of_bits)} | {', '.join(ends) or '-'} "
            f"| {' or '.join(sorted(named)) or '-'} | {f'{harmed} of {len(unfound)}' if unfound else '-'} |"
        )


def tell_cost(result: dict) -> None:
    """Print the share of the processor's time that the checks take, at the default of check_every."""
    due = [i for i in range(len(result["steps"])) if (i + 1) % CHECK_EVERY == 0]
    usual = [i for i in range(1, len(result["steps"]) - 1) if i not in due and (i + 1) % SAVE_EVERY]
    idle, check = (median(result["checked"][i] for i in steps) for steps in (usual, due))
    step, every = median(result["steps"][i] - result["checked"][i] for i in usual), Config().check_every
    print(
        f"at {COST_SIZE} px a step takes {1000 * step:.1f} ms of the processor; sums of the state in each step: "
        f"{idle / step:.2%} of it; a check: {check / step:.2f} of it; at check_every={every} in all: "
        f"{(idle + (check - idle) / every) / step:.2%}"
    )


def main(argv: list[str] | None = None) -> None:
    command(measure, Corruption, argv)


if __name__ == "__main__":
    main()
