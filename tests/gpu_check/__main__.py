"""Everything that one GPU can prove about this project, in one command of under ten minutes.

python -m tests.gpu_check [parts=parity,speed] [shapes=512,XL] [out=gpu_check.json] [device=cpu size=tiny] [budget=600]

docs/guide/gpu_check.md says what each part proves and how to read the table. Exits with 0 if no part failed, 1 if one
did, 2 for a mistake in the arguments.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.checks import did_you_mean
from data.cli import command, location
from data.storage.atomic import atomic_file
from tests.gpu_check.check import FAILED, LEFT_OUT, NOT_MEASURED, PARTS, PLANNED, Row

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("512", "XL", "M", "L", "II-L")
# Of the budget, for starting and ending processes and writing the JSON.
RESERVE_SECONDS = 5.0
NEVER_PROVEN = (
    "more than one GPU: the time of all-reduces, their overlap with the backward, bit-equality over several ranks",
    "a long training: the quality of images, and what hours of work do to a card",
    "the loader, the text encoder, storage and Slurm: they have tests that need no GPU",
)


@dataclass(slots=True)
class GPUCheck:
    """Checks on one GPU what no CPU can: parity, few-bit GELU, resume, synchronisations, memory, speed, overlap, NCCL.

    parts: which of them to run, all by default.
    shapes: the nets that are timed, of 512, XL, M, L and II-L, in their turn; 512 is XL's net at width 512.
    out: the JSON of all rows.
    device: cuda or cpu; on a CPU nothing is proven but that the checks run.
    size: full or tiny; tiny nets are for trying the checks out.
    budget: seconds for everything; what is not measured by then is named.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    out: str = location("gpu_check.json")
    device: str = "cuda"
    size: str = "full"
    budget: float = 600.0


def gpu_check(args: GPUCheck) -> None:
    """Run the parts one after another, print the table, write the JSON, exit with 1 if something failed."""
    check_arguments(args)
    started = time.monotonic()
    end = started + args.budget - RESERVE_SECONDS
    todo = [name for name in PARTS if name in args.parts]
    rows: list[dict] = []
    seconds: dict[str, float] = {}
    print("| part | what | result | in words |\n|---|---|---|---|", flush=True)
    for i, name in enumerate(todo):
        began = time.monotonic()
        limit = max(end - began, 1.0) * PARTS[name] / sum(PARTS[later] for later in todo[i:])
        for row in settle(part_rows(name, args, limit)):
            print(f"| {name} | {row.name} | {row.result} | {row.text} |", flush=True)
            rows.append({"part": name, **asdict(row)})
        seconds[name] = round(time.monotonic() - began, 1)
        write(args, rows, seconds)
    failed = [row for row in rows if row["result"] == FAILED]
    print(f"\n{time.monotonic() - started:.0f} s; every row with its numbers: {args.out}\n\nNot proven:")
    for line in not_proven(rows):
        print(f"- {line}")
    print("\nFailed:" if failed else "\nNothing failed.")
    for row in failed:
        print(f"- {row['part']}, {row['name']}: {row['text']}")
    if failed:
        sys.exit(1)


def check_arguments(args: GPUCheck) -> None:
    """Raises: ValueError for values that cannot be, and for device=cuda where torch can use no GPU."""
    lists = (("parts", args.parts, PARTS), ("shapes", args.shapes, SHAPES))
    single = (("device", [args.device], ("cuda", "cpu")), ("size", [args.size], ("full", "tiny")))
    for key, values, allowed in (*lists, *single):
        for value in values:
            if value not in allowed:
                raise ValueError(
                    f"{key}={value} is not known{did_you_mean(value, allowed)}; it is {', '.join(allowed)}"
                )
        if not values:
            raise ValueError(f"{key}= is empty: name one or more of {', '.join(allowed)}")
    if args.budget <= RESERVE_SECONDS:
        raise ValueError(f"budget={args.budget:g}: must be more than {RESERVE_SECONDS:g} seconds")
    if args.device == "cuda":
        import torch  # not at the top: it takes seconds, and --help has no need of it

        if not torch.cuda.is_available():
            raise ValueError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use: look at "
                "nvidia-smi and the driver's version, or try the checks themselves out with device=cpu size=tiny"
            )


def part_rows(name: str, args: GPUCheck, limit: float) -> Iterator[Row]:
    """The rows of a part as its process gives them. After `limit` seconds the process is killed."""
    module = [sys.executable, "-m", "tests.gpu_check.run_part"]
    arguments = [name, args.device, args.size, ",".join(args.shapes), f"{limit:.1f}"]
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        # A session of its own, so that whatever the part has started ends with it.
        process = subprocess.Popen(
            module + arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def out_of_time() -> None:
            late.set()
            kill()

        timer = threading.Timer(limit, out_of_time)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                yield Row(**json.loads(line))
            process.wait()
        finally:
            timer.cancel()
            kill()
            process.wait()
        if late.is_set():
            yield Row(name, NOT_MEASURED, f"stopped after its {limit:.0f} s")
        elif process.returncode:
            errors.seek(0)
            tail = errors.read()[-4000:]
            last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
            ended = f"ended with status {process.returncode}"
            yield Row(name, FAILED, f"{ended}: {last.strip()[:200]}", {"stderr": tail})


def settle(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows without those that only say what is planned; at the end what was planned and not done."""
    waiting: dict[str, None] = {}
    for row in rows:
        if row.result == PLANNED:
            waiting[row.name] = None
        else:
            waiting.pop(row.name, None)
            yield row
    for name in waiting:
        yield Row(name, NOT_MEASURED, "out of time")


def not_proven(rows: list[dict]) -> list[str]:
    """What the rows leave open, and what one GPU cannot show at all."""
    open_rows = [row for row in rows if row["result"] in (LEFT_OUT, NOT_MEASURED)]
    return [f"{row['part']}, {row['name']}: {row['result']}, {row['text']}" for row in open_rows] + list(NEVER_PROVEN)


def write(args: GPUCheck, rows: list[dict], seconds: dict[str, float]) -> None:
    """Write the JSON; again after each part, so that what was measured outlives a machine that is taken away."""
    failed = [f"{row['part']}, {row['name']}" for row in rows if row["result"] == FAILED]
    found = {
        "device": args.device,
        "size": args.size,
        "budget": args.budget,
        "seconds": seconds,
        "failed": failed,
        "not_proven": not_proven(rows),
        "rows": rows,
    }
    with atomic_file(args.out) as path:
        path.write_text(json.dumps(found, indent=1))


def main(argv: list[str] | None = None) -> None:
    command(gpu_check, GPUCheck, argv)


if __name__ == "__main__":
    main()
