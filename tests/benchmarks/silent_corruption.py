"""Bits flipped on one rank: what finds them, and after how many steps. `python -m tests.benchmarks.silent_corruption`.

Prints a table of docs/measurements/corruption.md, and what the checks cost in processor time.
"""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.cli import command, location
from tests.support.flipped_bits import BITS, CHECK_EVERY
from tests.support.trainings import make_data, run_ranks

REPO = Path(__file__).resolve().parent.parent.parent
# What is flipped, and the steps in which it begins.
WHAT = {
    "masters": (2,),
    "moments": (2,),
    "average": (2,),
    "weights": (2, CHECK_EVERY),
    "gradient, once": (2, CHECK_EVERY),
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
    trials = [{"what": "none"}, *({"what": w, "step": s, "bit": bit} for w, s in kinds for bit in BITS)]
    run_ranks(
        REPO, args.ranks, "-m", "tests.support.flipped_bits", str(work / "data"), str(work / "out"), json.dumps(trials),
        timeout=7200,
    )  # fmt: skip
    none, *results = json.loads((work / "out").read_text())
    assert not none["found"], none
    rows = defaultdict(list)
    for trial, result in zip(trials[1:], results, strict=True):
        rows[trial["what"], trial["step"]].append(result)
    print(f"{args.ranks} ranks, check_every={CHECK_EVERY}")
    print(
        "| what is flipped | from step | found | in step | named: the rank, both or others | unfound: masters differ at the end |"
    )
    print("|---|---:|---:|---:|---|---:|")
    for (what, step), found in rows.items():
        detected = [result for result in found if result["found"]]
        named = {
            "the rank" if result["said"].count("rank 1 (") and result["said"].count("(device") == 1
            else "both" if args.ranks == 2 and result["said"].count("(device") == 2 else "others"
            for result in detected
        }  # fmt: skip
        unfound = [result for result in found if not result["found"]]
        harmed = sum(result["masters"] != none["masters"] for result in unfound)
        steps = ", ".join(str(step) for step in sorted({result["found"] for result in detected})) or "-"
        print(
            f"| {what} | {step} | {len(detected)} of {len(found)} | {steps} | {', '.join(sorted(named)) or '-'} "
            f"| {f'{harmed} of {len(unfound)}' if unfound else '-'} |"
        )


def main(argv: list[str] | None = None) -> None:
    command(measure, Corruption, argv)


if __name__ == "__main__":
    main()
