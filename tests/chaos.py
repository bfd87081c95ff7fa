"""A chained run through 50 kills and more, against one that nothing happened to: `python -m tests.chaos out=DIR`."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.torch import load_file

from data.cli import CORRUPTED, REQUEUE, command, location
from tests.support.slowed import slowed
from tests.support.trainings import launch, make_data, metrics, rank_processes, start, starts_of
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import complete_checkpoints, latest_checkpoint, leave_out, read_manifest, step_of
from train.monitor.stragglers import LINES

REPO = Path(__file__).resolve().parent.parent
TINY = (
    "wandb.mode=disabled", "model.image_size=16", "model.channel_mult=[1,1]", "model.attention_resolutions=[8]",
    "model.num_res_blocks=1", "save_every=3", "keep_checkpoints=3", "log_every=1",
)  # fmt: skip
# For a training to its end, on a busy machine too. One that hangs ends itself (hang_seconds).
PATIENCE = 3600.0
# How long a folder is gone at most, and how long processes stand still.
LOST_SECONDS, STILL_SECONDS = 60.0, 5.0
# What starts a training that flips a bit, in a step that comes after all that a start is waited for.
FLIP_STEP = 15
FLIPPED = {"script": REPO / "tests/support/flipped_run.py", "before": (str(FLIP_STEP),)}
# What starts a training that meets a bad batch, which is after so many steps, since the errors of a young net scatter.
LEARNED = 150
SPOILED = REPO / "tests/support/spoiled_run.py"
SPIKES = ("on_spike=rollback", "spike_factor=8")
# By which share a rank is slowed: more than the noise of cores that have other work.
SLOWER = 1.0
SAME = ("step", "loss", "mse", "vb", "lr", "grad_norm", "samples", "bad_samples", "skipped_steps")


@dataclass
class Chaos:
    """Kills a training again and again, and compares it with one that nothing happened to.

    out: a folder for the data and the two runs; it is deleted first.
    kills: how often processes are killed.
    others: how often each of the other faults happens.
    steps: of the training.
    seed: of the moments and the victims.
    """

    out: str = location("runs/chaos")
    kills: int = 50
    others: int = 2
    steps: int = 900
    seed: int = 0


class Run:
    """One start of a training by two ranks or more, and what can be done to it."""

    def __init__(self, data: Path, run_dir: Path, *overrides: str, ranks: int = 2, **script) -> None:
        self.run_dir, self._starts_before = run_dir, len(starts_of(run_dir))
        self._log = open(run_dir.parent / f"{run_dir.name}.log", "w+")  # noqa: SIM115 - closed in end()
        to_log = {"stdout": self._log, "stderr": self._log}
        self.process = start(REPO, data, run_dir, *TINY, *overrides, ranks=ranks, **script, **to_log)

    def wait_for(self, steps: int, patience: float = 180.0) -> None:
        """Until so many steps of this start are made, or it has ended."""
        until = time.monotonic() + patience
        while self.process.poll() is None and self._made() < steps:
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)

    def _made(self) -> int:
        own = starts_of(self.run_dir)[self._starts_before :]
        return last_step(self.run_dir) - own[0]["step"] if own else 0

    def tree(self) -> list[psutil.Process]:
        """All processes below the launcher, itself not included."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """The training processes, the first rank first."""
        return rank_processes(self.process)

    def said(self) -> str:
        """Output so far."""
        return (self.run_dir.parent / f"{self.run_dir.name}.log").read_text()

    def end(self, tree: list[psutil.Process], patience: float = 120.0) -> int:
        """Wait until every process has ended; the launcher's exit status."""
        _, alive = psutil.wait_procs(tree, timeout=patience)
        assert not alive, f"{alive} still live\n{self.said()[-3000:]}"
        self._log.close()
        return self.process.wait(timeout=patience)


def last_step(run_dir: Path) -> int:
    """Of the metrics' last whole line."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def kill_a_rank(run: Run, draw: random.Random) -> str:
    """With SIGKILL, at any moment."""
    time.sleep(draw.uniform(0, 1.0))
    draw.choice(run.ranks()).kill()
    return "rank killed"


def kill_a_rank_that_saves(run: Run, draw: random.Random) -> str:
    """With SIGKILL, while a checkpoint is being written, or has just been."""
    until = time.monotonic() + 5
    while not (saving := list((run.run_dir / "checkpoints").glob("*.part"))) and time.monotonic() < until:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01))
    draw.choice(run.ranks()).kill()
    return "rank killed in a save" if saving else "rank killed"


def kill_everything(run: Run, draw: random.Random) -> str:
    """As when a machine loses its power."""
    time.sleep(draw.uniform(0, 1.0))
    for process in [psutil.Process(run.process.pid), *run.tree()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return "all killed"


def kill_the_launcher(run: Run, draw: random.Random) -> str:
    """With SIGKILL, the process that started the ranks; without it they save and leave."""
    run.ranks()[0].parent().kill()
    return "launcher killed"


def ask_a_rank(run: Run, draw: random.Random) -> str:
    """SIGUSR1 to one rank."""
    draw.choice(run.ranks()).send_signal(signal.SIGUSR1)
    return "SIGUSR1"


def end_all(run: Run, draw: random.Random) -> str:
    """SIGTERM to all processes, the launcher and the loader workers included."""
    for process in run.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    return "SIGTERM"


def kill_a_worker(run: Run, draw: random.Random) -> str:
    """A loader worker, with SIGKILL; the run goes on, and is asked to leave a little later."""
    draw.choice(draw.choice(run.ranks()).children()).kill()
    return ask_what_goes_on(run, draw, "loader worker killed")


def lose_the_folder(run: Run, draw: random.Random) -> str:
    """The run's folder is gone for up to a minute, as a mount is; a save in that time ends the run."""
    away = run.run_dir.with_name("away")
    run.run_dir.rename(away)
    time.sleep(draw.uniform(1, LOST_SECONDS))
    # What a run would write on the disk below a lost mount must not hide what comes back.
    assert not run.run_dir.exists(), f"{run.run_dir} was made anew: {sorted(run.run_dir.rglob('*'))}"
    away.rename(run.run_dir)
    return ask_what_goes_on(run, draw, "folder lost")


def stall_the_data(run: Run, draw: random.Random) -> str:
    """The loader workers of a rank stand still for some seconds, as on a storage that does not answer."""
    return pause(run, draw, draw.choice(run.ranks()).children(), "storage stalled")


def pause_a_rank(run: Run, draw: random.Random) -> str:
    """A rank stands still for some seconds, and the others wait for it."""
    return pause(run, draw, [draw.choice(run.ranks())], "rank paused")


def pause(run: Run, draw: random.Random, processes: list[psutil.Process], name: str) -> str:
    for process in processes:
        process.suspend()
    time.sleep(draw.uniform(1, STILL_SECONDS))
    for process in processes:
        process.resume()
    return ask_what_goes_on(run, draw, name)


def ask_what_goes_on(run: Run, draw: random.Random, name: str) -> str:
    """After a fault that a run may survive: a few steps on, it is asked to leave."""
    run.wait_for(run._made() + 4)
    if run.process.poll() is not None:
        return f"{name}, which ended the run"
    with contextlib.suppress(psutil.Error, IndexError):  # it may be about to end
        ask_a_rank(run, draw)
    return name


def flip_a_bit(run: Run, draw: random.Random) -> str:
    """Of one rank's masters, in step FLIP_STEP: all ranks end before the next checkpoint, and name that one."""
    run.process.wait(timeout=180)
    assert "its masters changed while nothing wrote to them" in run.said(), run.said()[-3000:]
    return "bit flipped"


def slow_a_rank(run: Run, draw: random.Random) -> str:
    """A rank takes twice as long for all it does; the metrics name it where other work on its core does not hide it."""
    rank, there = draw.randrange(2), len(metrics(run.run_dir))
    with slowed(run.ranks()[rank], SLOWER):
        run.wait_for(run._made() + 3 * LINES)
    named = [line["straggler_rank"] for line in metrics(run.run_dir)[there + LINES :] if "straggler_rank" in line]
    right = 2 * named.count(rank) > len(named)
    return ask_what_goes_on(run, draw, f"rank slowed, {'' if right else 'not '}named")


def meet_bad_data(run: Run, draw: random.Random) -> str:
    """A batch of checkerboards: it is told with its samples, and the run goes back and leaves it out."""
    back = re.compile(
        r"SPIKE step (\d+), batch (\d+): .* highest mse: (.*)\n(?:.*\n)*?.*without batch \2 from there on"
    )
    until = time.monotonic() + 300
    while not (found := back.search(run.said())):
        assert run.process.poll() is None and time.monotonic() < until, run.said()[-3000:]
        time.sleep(0.2)
    assert int(found[2]) >= LEARNED and found[3].count(".tar:") == 8, found[0]
    # The next start of the ranks, which is no start of the launcher.
    run.wait_for(run._made() + 4)
    return ask_what_goes_on(run, draw, "bad data")


def start_before(fault: Callable, data: Path, run_dir: Path, steps: str) -> Run:
    """A start to which the fault will happen."""
    if fault is flip_a_bit:
        return Run(data, run_dir, steps, **FLIPPED)
    if fault is meet_bad_data:
        latest = latest_checkpoint(run_dir)
        bad = max(LEARNED, step_of(latest) + 4 if latest else 0) + len(left_out_by(run_dir))
        return Run(data, run_dir, steps, *SPIKES, script=SPOILED, before=(str(bad),))
    return Run(data, run_dir, steps)


def left_out_by(run_dir: Path) -> list[int]:
    """The batches that a run has left out."""
    latest = latest_checkpoint(run_dir)
    return [entry["batch"] for entry in read_manifest(latest)["spikes"]["left_out"]] if latest else []


OTHERS = [
    ask_a_rank, end_all, kill_a_worker, kill_the_launcher, lose_the_folder, stall_the_data, pause_a_rank, slow_a_rank,
    flip_a_bit, meet_bad_data,
]  # fmt: skip


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint, '' for nothing."""
    try:
        return Checkpoint.read(folder).verify()
    except ValueError as error:
        return str(error)


def damage(folder: Path, name: str, draw: random.Random) -> None:
    """Flip one bit of a file of a checkpoint."""
    data = bytearray((folder / name).read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(data)


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """In the last checkpoints, bit for bit, and in the curves."""
    found = []
    ours, theirs = latest_checkpoint(run_dir), latest_checkpoint(undisturbed)
    for file in sorted(theirs.glob("*.safetensors")):
        a, b = load_file(ours / file.name), load_file(file)
        found += [f"{file.name} {name}" for name in b if name not in a or not a[name].equal(b[name])]
    a_lines, b_lines = ([[line.get(name) for name in SAME] for line in metrics(run)] for run in (run_dir, undisturbed))
    found += [f"step {b[0]}: {a} is not {b}" for a, b in zip(a_lines, b_lines, strict=False) if a != b]
    if len(a_lines) != len(b_lines):
        found.append(f"{len(a_lines)} steps, not {len(b_lines)}")
    return found


def undisturbed(data: Path, run_dir: Path, steps: str, left_out: list[int]) -> None:
    """A run to which nothing happens, and which never meets these batches."""
    run = Run(data, run_dir, steps)
    run.wait_for(3)
    tree = run.tree()
    ask_a_rank(run, random.Random(0))
    assert run.end(tree) == REQUEUE and last_step(run_dir) < LEARNED
    for folder in complete_checkpoints(run_dir):
        for batch in left_out:
            leave_out(folder, {"batch": batch, "what": "the other run left it out"})
    done = launch(REPO, data, run_dir, *TINY, steps, ranks=2, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]


def chaos(args: Chaos) -> dict:
    """Run it; returns what happened.  Raises: ValueError."""
    if args.others and args.steps < 2 * LEARNED:
        raise ValueError(f"steps={args.steps} must be at least {2 * LEARNED}: bad data comes after step {LEARNED}")
    out, draw = Path(args.out), random.Random(args.seed)
    shutil.rmtree(out, ignore_errors=True)
    data = make_data(out / "data")
    steps = f"steps={args.steps}"
    kills = [kill_a_rank, kill_a_rank_that_saves, kill_everything]
    plan = [kills[i % 3] for i in range(args.kills)] + OTHERS * args.others
    draw.shuffle(plan)
    happened: Counter[str] = Counter()
    slowest, run_dir = 0.0, out / "disturbed"
    for number, fault in enumerate(plan):
        run = start_before(fault, data, run_dir, steps)
        run.wait_for(draw.randint(1, 3))
        assert run.process.poll() is None, f"ended before its fault: {run.said()[-3000:]}"
        tree = run.tree()
        name = fault(run, draw)
        began = time.monotonic()
        status = run.end(tree)
        slowest = max(slowest, time.monotonic() - began)
        happened[name] += 1
        expected = {ask_a_rank: REQUEUE, flip_a_bit: CORRUPTED}.get(fault, status)
        assert status == expected, (status, run.said()[-3000:])
        if number % 10 == 9 and (latest := latest_checkpoint(run_dir)):
            damage(latest, draw.choice(sorted(f.name for f in latest.iterdir())), draw)
            happened["checkpoint damaged"] += 1
        print(f"{number + 1}/{len(plan)} {name}: exit {status}, step {last_step(run_dir)}", flush=True)
    done = launch(REPO, data, run_dir, *TINY, steps, ranks=2, timeout=PATIENCE)
    assert done.returncode == 0 and (run_dir / "done").exists(), done.stderr[-3000:]
    undisturbed(data, out / "undisturbed", steps, left_out_by(run_dir))
    faults = [fault for folder in complete_checkpoints(run_dir) if (fault := fault_of(folder))]
    return {
        "happened": dict(happened),
        "slowest end after a fault, s": round(slowest, 1),
        "differences": differences(run_dir, out / "undisturbed") + faults,
    }


def report(args: Chaos) -> None:
    """Print what happened. Exits: 1 if anything differs."""
    began = time.monotonic()
    result = chaos(args)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["differences"]))


def main(argv: list[str] | None = None) -> None:
    command(report, Chaos, argv)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
