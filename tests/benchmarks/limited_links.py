"""The time of a step whose ranks are behind slow links, with the gradients sent behind the backward and inside it.

python -m tests.benchmarks.limited_links [ranks=4]. Needs root, `ip` and `tc`: each rank is in a network namespace, and
tc limits what it sends. Also counts the bytes that it sends, beside those of the plan. Prints tables in Markdown.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from data.cli import command
from launch.cost.overlap import exposed_seconds
from tests.support.namespaces import LINK, MASTER, machines, missing
from tests.support.paced_steps import FORWARD

# Collectives as a share of forward and backward: the plan's for XL on 64 x 8 A100, by Gbit/s of a node's link.
XL = {0: 0.0, 1600: 0.39, 800: 0.78, 200: 3.1}
ALL_REDUCES = 2 / 3  # of the collectives' bytes; the rest gathers the weights behind the update
LIMIT_SECONDS = 300


@dataclass
class LimitedLinks:
    """Measures steps behind limited links.

    ranks: how many, each in a namespace.
    links: Gbit/s of a node's link whose proportions are taken, of 1600, 800 and 200; 0 for no limit.
    compute: seconds of forward and backward.
    steps: steps of each case and way, in turn, of which the medians are printed.
    """

    ranks: int = 4
    links: list[int] = field(default_factory=lambda: list(XL))
    compute: float = 1.0
    steps: int = 3


def measure(args: LimitedLinks) -> None:
    """Print what each rank sends, then a row for each link: the time measured, and that of the plan's model.

    `hidden` is the time that overlapping has won, as a share of the all-reduces' own.
    """
    if why := missing():
        raise ValueError(why)
    unknown = sorted({*args.links} - {*XL})
    if unknown:
        raise ValueError(f"links={unknown[0]} must be one of {', '.join(map(str, XL))}")
    found = steps_of(args.ranks, [XL[link] for link in args.links], args.compute, args.steps)
    print(f"{args.ranks} ranks, {found['trained']:,} parameters in bf16, {len(found['sizes']['inside'])} all-reduces\n")
    print("| the real engine's step | MB sent by a rank | of the plan's |\n|---|---|---|")
    for way, of_ranks in found["engine"].items():
        mean = sum(of_ranks) / len(of_ranks)
        print(f"| {way} the backward | {mean / 1e6:.2f} | {mean / found['planned']:.3f} |")
    heads = "Mbit/s of a rank | collectives alone | behind | inside | of behind | hidden | by the plan"
    print(f"\n| link as XL's at | {heads} |")
    print("|---" * 8 + "|")
    for link, case in zip(args.links, found["cases"], strict=True):
        name, mbit = (f"{link} Gbit/s", f"{case['mbit']:.0f}") if link else ("no limit", "-")
        alone = case["ratio"] * args.compute
        behind, inside = (statistics.median(case[way]) for way in ("behind", "inside"))
        ratios = [b / a for a, b in zip(case["behind"], case["inside"], strict=True)]
        times = f"{behind:.2f} s | {inside:.2f} s | {min(ratios):.2f} to {max(ratios):.2f}"
        hidden = f"{(behind - inside) / (alone * ALL_REDUCES):.0%}" if link else "-"
        print(
            f"| {name} | {mbit} | {f'{alone:.2f} s' if link else '-'} | {times} | {hidden} "
            f"| {planned(found, alone, args.compute):.2f} s |"
        )


def planned(found: dict, alone: float, compute: float) -> float:
    """Seconds of the step with overlap by the plan's model.  alone: seconds of all collectives."""
    sizes, backward = found["sizes"]["inside"], (1 - FORWARD) * compute
    ready = [moment * backward for moment in found["moments"]["inside"]]
    # An all-reduce sends twice what it reduces, and the all-gather half of that.
    seconds = [alone * ALL_REDUCES * size / sum(sizes) for size in sizes]
    return compute + exposed_seconds(ready, seconds, rate=1.0) + alone * (1 - ALL_REDUCES) + ready[-1] - backward


def steps_of(ranks: int, ratios: list[float], compute: float, steps: int) -> dict:
    """What rank 0 of tests/support/paced_steps.py found.

    Raises: OSError if there can be no namespaces; RuntimeError if a rank fails.
    """
    common = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK, "MASTER_ADDR": MASTER,
        "MASTER_PORT": "29500", "WORLD_SIZE": str(ranks), "LOCAL_SIZE": "1", "LOCAL_RANK": "0",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, machines(ranks) as names:
        out = Path(folder) / "found.json"
        program = [sys.executable, "-m", "tests.support.paced_steps", str(out), json.dumps(ratios)]
        started: list[subprocess.Popen] = []
        try:
            for rank, name in enumerate(names):
                command = ["ip", "netns", "exec", name, *program, str(compute), str(steps)]
                log = (Path(folder) / f"{rank}.log").open("w", encoding="utf-8")
                started.append(
                    subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT)
                )
                log.close()
            codes = [process.wait(LIMIT_SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        if any(codes):
            first = next(rank for rank, code in enumerate(codes) if code)
            raise RuntimeError(f"rank {first}: {(Path(folder) / f'{first}.log').read_text()[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    command(measure, LimitedLinks, argv)


if __name__ == "__main__":
    main()
