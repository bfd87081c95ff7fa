"""The batch script of a training: checks it, starts a launcher on each node, again after a fault, until it is done.

    python -m launch.slurm.batch +experiment=if_i_xl        inside a job; launch/slurm/train.sbatch runs it

Environment variables and their defaults: RANKS_PER_NODE (the GPUs of a node), MAX_RESTARTS (100), PREFLIGHT (1: run it
before the first start; 0: never), SPARES (0: nodes of the job that wait to take over), MAX_NODE_FAULTS (3: a node
with so many faults in RUN_DIR/nodes.json, or one corruption, is left out; 0: none is), LOGS (run_dir/logs), HOSTFILE
(written for the job), MASTER_PORT (a free one), SRUN_ARGS (none: more options of srun, such as those of a container).
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.cli import MISTAKE, QUIET, QUIET_LINE, REQUEUE, run_command
from data.progress import is_quiet
from launch.slurm.allocation import Allocation, check_commands, check_hostfile, find_allocation
from launch.slurm.in_place import (
    SETTLE_SECONDS,
    TRIES,
    choose_nodes,
    first_to_fail,
    read_ends,
    spare_nodes,
    usable_nodes,
)
from train.compose import ROOT, compose_config, training_help
from train.config import Config, check_accumulation
from train.faults.quarantine import ENOUGH_ALONE, NODES, bad_nodes, fault_counts, record_node_fault

# The launcher has no handler for USR1, which would kill it: it ignores the signal, and the ranks install a handler.
# The name of the log has Slurm's name of the node, which may differ from the machine's.
# It numbers the GPUs of its ranks from 0, which on a shared node are not always those that Slurm gave: `env` gives the
# ranks Slurm's CUDA_VISIBLE_DEVICES back.
NODE = """
log=$1-$SLURMD_NODENAME.log hostfile=$2 address=$3 port=$4; shift 4
exec >>"$log" 2>&1; trap "" USR1
asked=0; trap 'asked=1' TERM  # so that the status is told; the launcher gets the signal too
"$0" --no_ssh --no_local_rank --node_rank "$SLURM_NODEID" --hostfile "$hostfile" \\
    --master_addr "$address" --master_port "$port" --no_python \\
    env ${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"} "${0%/*}/python" -u "$@"
status=$?; echo "$status $(date +%s.%N) $asked" >"${log%.log}.status"; exit "$status"
"""
# By its full path: the `deepspeed` on PATH may be launch/slurm/bin/deepspeed.
LAUNCHER = Path(sys.executable).with_name("deepspeed")


@dataclass(slots=True)
class Job:
    """A job in its allocation.

    srun_args: more options for srun.
    warned: Slurm has sent its warning before the end of the job.  cancelled: Slurm has ended the job.
    """

    allocation: Allocation
    hostfile: Path
    logs: Path
    srun_args: list[str] = field(default_factory=list)
    warned: bool = False
    cancelled: bool = False
    steps: list[subprocess.Popen] = field(default_factory=list)

    def install_signal_handlers(self) -> None:
        """Handle USR1, which Slurm sends to the batch script only, and TERM, which it sends to all processes."""
        signal.signal(signal.SIGUSR1, self._warn)
        signal.signal(signal.SIGTERM, self._cancel)

    def _warn(self, *_: object) -> None:
        say("Slurm's warning: all ranks are asked to save and leave")
        self.warned = True
        # Without --batch, scancel signals the steps of the job, but not this script again.
        subprocess.run(["scancel", "--signal=USR1", self.allocation.job_id], check=False)

    def _cancel(self, *_: object) -> None:
        self.cancelled = True

    def goes_on_after(self, seconds: float) -> bool:
        """Wait, and return whether the job still goes on then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (self.warned or self.cancelled):
            time.sleep(0.2)
        return not (self.warned or self.cancelled)

    def log(self, name: str) -> str:
        """Where the logs of a program lie, without -NODE.log."""
        return f"{self.logs}/{name}-{self.allocation.job_id}"

    def use(self, allocation: Allocation) -> None:
        """Run what comes next on these nodes, by a hostfile of our own."""
        self.allocation, self.hostfile = allocation, self.logs / f"hostfile-{allocation.job_id}"
        self.hostfile.write_text(allocation.hostfile())

    def run(self, name: str, *program: str) -> int:
        """Run arguments of Python on every rank; returns the highest exit status, above 128 if a signal ended it."""
        allocation, nodes, log = self.allocation, self.allocation.nodes, self.log(name)
        say(f"{name}: {len(nodes)} nodes x {allocation.ranks_per_node}, logs in {log}-NODE.log")
        command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--overlap"]
        command += [f"--nodelist={','.join(nodes)}"]
        # The one task of a node starts all of its ranks and their loader workers: it must not be bound to one CPU.
        command += ["--kill-on-bad-exit=1", "--cpu-bind=none", *self.srun_args, "bash", "-c", NODE, str(LAUNCHER), log]
        command += [str(self.hostfile), allocation.master_addr, str(allocation.master_port), *program]
        command += [QUIET] * is_quiet()
        # In the current folder, from which run_dir is reckoned; in a session of its own, so that signals to this script
        # do not end it.
        step = subprocess.Popen(command, start_new_session=True)
        while True:
            try:
                status = step.wait()
                return status if status >= 0 else 128 - status
            except InterruptedError:
                continue


def split_srun_args(text: str) -> list[str]:
    """The options of SRUN_ARGS, as a shell would split them.

    Raises: ValueError if a quote is not closed, or the first is no option, which srun would run as a program.
    """
    try:
        args = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"SRUN_ARGS={text} cannot be split into options: {str(error).lower()}") from None
    if args and not args[0].startswith("-"):
        raise ValueError(f"SRUN_ARGS={text} must be options of srun, such as --container-image=NAME")
    return args


def say(text: str) -> None:
    """Print a line to the log of the job."""
    print(f"[{os.environ.get('SLURM_JOB_ID', '-')}] {text}", flush=True)


def latest_step(run_dir: Path) -> int:
    """The step of the latest complete checkpoint, 0 if there is none."""
    from train.checkpoint.format import latest_checkpoint, step_of  # here, since it imports torch

    latest = latest_checkpoint(run_dir)
    return step_of(latest) if latest else 0


def verdict(
    status: int, done: bool, warned: bool, restarts: int, most: int, began_at: int, reached: int
) -> tuple[bool, str]:
    """Whether to requeue the job, and why.

    done: whether RUN_DIR/done exists, since the exit status of a launcher does not say reliably that a run is finished.
    most: restarts at most.  began_at, reached: steps of the latest checkpoint before this start and now.
    """
    if done:
        return False, "finished: RUN_DIR/done exists"
    if status == MISTAKE and not warned:
        return False, "a mistake must be corrected, see the log of the first node; not requeued"
    if restarts >= most:
        return False, f"requeued {restarts} times, MAX_RESTARTS={most}: look at the logs, then submit it again"
    if status == REQUEUE or warned:
        return True, f"stopped at step {reached} as asked: requeued"
    if reached > began_at:
        return True, f"ended with status {status} after saving step {reached} (began at {began_at}): requeued"
    return (
        False,
        f"ended with status {status} without a checkpoint later than step {began_at}; not requeued, see the logs",
    )


def train_in_place(job: Job, whole: Allocation, config: Config, overrides: list[str], faults: int) -> int:
    """Train; after a fault start again in the same job, on other nodes if some are lost. Returns the last status.

    The node on which it failed first, and those that Slurm has lost, are counted in RUN_DIR/nodes.json.
    whole: with the spare nodes.  faults: of a node that is left out from then on; 0 for none.
    """
    run_dir, wanted, usable = Path(config.run_dir), len(job.allocation.nodes), whole.nodes
    start = fruitless = 0
    while True:
        began_at, nodes = latest_step(run_dir), job.allocation.nodes
        # train/main.py in the repository's root, a longer path where the package is installed.
        status = job.run("train", os.path.relpath(ROOT / "train" / "main.py"), *overrides)
        reached, ends = latest_step(run_dir), read_ends(job.log("train"), nodes)
        # Where one rank found a mistake, srun's status is that of the others, which lost it.
        if any(end.status == MISTAKE for end in ends.values()):
            return MISTAKE
        if (run_dir / "done").exists() or status == MISTAKE or not reached or job.warned or job.cancelled:
            return status
        fruitless = 0 if reached > began_at else fruitless + 1
        if fruitless and not job.goes_on_after(SETTLE_SECONDS):
            return status
        before, usable, start = usable, usable_nodes(whole), start + 1
        lost = sorted(set(before) - set(usable))
        # With a lost node the ranks of the others fail too.
        first = "" if lost else first_to_fail(ends)
        for node in sorted({*lost, *([first] if first else [])}):
            what = "the node went down" if node in lost else "the training failed there first"
            record_node_fault(run_dir, node, "death", f"after step {reached}: {what}")
        bad, failed = _known_faults(run_dir, faults)
        left = [node for node in usable if node not in bad]
        for node in sorted(set(nodes) & set(bad)):
            say(left_out(node, bad[node], faults))
            fruitless = 0
        if fruitless == TRIES:
            say(f"{TRIES} starts in a row made no checkpoint later than step {reached}")
            return status
        chosen = choose_nodes(whole.nodes, left, failed, wanted, lambda n: _fits(config, n * whole.ranks_per_node))
        at_fault = f", first on {first}" if first else ""
        if not chosen:
            say(f"ended with status {status}{at_fault}; {len(left)} of {len(whole.nodes)} nodes are left, too few")
            return status
        out, new = sorted(set(nodes) - set(chosen)), sorted(set(chosen) - set(nodes))
        change = f" without {','.join(out)}" * bool(out) + f", with {','.join(new)}" * bool(new)
        say(f"ended with status {status}{at_fault}: starts again in place{change}, from step {reached}")
        job.use(whole.on(chosen, start))


def _known_faults(run_dir: Path, most: int) -> tuple[dict[str, str], Counter[str]]:
    """bad_nodes and fault_counts; none, said in a line, where they cannot be read: a run that is under way goes on."""
    try:
        return bad_nodes(run_dir, most), fault_counts(run_dir)
    except (OSError, ValueError) as error:
        say(f"the faults of the nodes are not known: {error}")
        return {}, Counter()


def _fits(config: Config, ranks: int) -> bool:
    try:
        check_accumulation(config, ranks)
    except ValueError:
        return False
    return True


# Slurm changes the nodes that a job avoids while it is pending, and after `requeue` it is, though this script still
# runs; the TERM that comes with it must not end this.
REQUEUE_WITHOUT = """
trap "" TERM
scontrol requeue "$0" || exit
[ -z "$1" ] || scontrol update JobId="$0" ExcNodeList="$1"
"""


def requeue(job_id: str, avoid: list[str]) -> bool:
    """Requeue this job, from now on without some nodes, and those that sbatch was told; False if it could not be."""
    shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False).stdout
    before = [word.partition("=")[2] for word in shown.split() if word.startswith("ExcNodeList=")]
    # Of one name that Slurm does not know, such as that of a node that is gone, it would take none.
    known = [node for node in avoid if _is_known(node)]
    nodes = ",".join([*(name for name in before if name != "(null)"), *known]) if known else ""
    command = ["bash", "-c", REQUEUE_WITHOUT, job_id, nodes]
    return subprocess.run(command, check=False, start_new_session=True).returncode == 0


def _is_known(node: str) -> bool:
    return subprocess.run(["scontrol", "show", "node", node], capture_output=True, check=False).returncode == 0


def left_out(node: str, what: str, most: int) -> str:
    """The line that says why a node is left out.  most: faults of a node."""
    return f"{node} is left out: {what}; MAX_NODE_FAULTS={most}, and one of {ENOUGH_ALONE} is enough"


def leave_out_bad_nodes(allocation: Allocation, run_dir: Path, most: int, restarts: int) -> None:
    """Requeue this job without the nodes of its allocation that bad_nodes() names, if there are any.

    most: faults of a node.  restarts: of the job at most.
    Exits: once it is requeued.
    Raises: ValueError if it cannot be; ValueError, OSError if RUN_DIR/nodes.json cannot be read.
    """
    bad = bad_nodes(run_dir, most)
    here = [node for node in allocation.nodes if node in bad]
    for node in here:
        say(left_out(node, bad[node], most))
    if not here:
        return
    if allocation.restarts < restarts and requeue(allocation.job_id, list(bad)):
        say(
            f"requeued without {', '.join(bad)}; where Slurm has no others, the job waits until you forget their faults"
        )
        signal.pause()
        sys.exit(REQUEUE)
    raise ValueError(
        f"{', '.join(here)} failed too often, and this job cannot be requeued without: submit it with --exclude="
        f"{','.join(bad)}; or, if they are repaired, delete them in {run_dir / NODES}"
    )


def first_nodes(nodes: list[str], run_dir: Path, wanted: int, most: int) -> list[str]:
    """The nodes of the first start, those that bad_nodes() names only where too few others are there.

    most: faults of a node.
    Raises: ValueError, OSError if RUN_DIR/nodes.json cannot be read.
    """
    bad = bad_nodes(run_dir, most)
    good = [node for node in nodes if node not in bad]
    usable = good if len(good) >= wanted else nodes
    return choose_nodes(nodes, usable, fault_counts(run_dir), wanted, lambda _: True)


def batch(overrides: list[str]) -> None:
    """Run the job. Exits with its status.

    Raises: ValueError, OSError for what the user can fix.
    """
    whole = find_allocation()
    spares = spare_nodes(os.environ, len(whole.nodes))
    check_commands(LAUNCHER)
    srun_args = split_srun_args(os.environ.get("SRUN_ARGS", ""))
    config = compose_config(overrides)
    run_dir, wanted = Path(config.run_dir), len(whole.nodes) - spares
    most, faults = int(os.environ.get("MAX_RESTARTS", "100")), int(os.environ.get("MAX_NODE_FAULTS", "3"))
    allocation = whole.on(first_nodes(whole.nodes, run_dir, wanted, faults), start=0)
    check_accumulation(config, allocation.ranks)
    logs = Path(os.environ.get("LOGS") or run_dir / "logs").absolute()
    logs.mkdir(parents=True, exist_ok=True)
    hostfile = Path(os.environ.get("HOSTFILE") or logs / f"hostfile-{allocation.job_id}")
    if "HOSTFILE" not in os.environ:
        hostfile.write_text(allocation.hostfile())
    check_hostfile(hostfile, allocation)
    job = Job(allocation, hostfile, logs, srun_args)
    job.install_signal_handlers()
    leave_out_bad_nodes(allocation, run_dir, faults, most)
    if os.environ.get("PREFLIGHT", "1") != "0" and not (allocation.restarts and latest_step(run_dir)):
        if spares:
            job.use(whole)
        status = job.run("preflight", "-m", "launch.preflight", *([f"spares={spares}"] if spares else []), *overrides)
        if status or job.cancelled:
            say(f"the preflight ended with status {status}, so no training is started: {logs}/preflight-*.log say why")
            sys.exit(status)
    began_at, status = latest_step(run_dir), REQUEUE
    if not job.warned:
        if spares:
            job.use(allocation)
        status = train_in_place(job, whole, config, overrides, faults)
    again, why = verdict(
        status, (run_dir / "done").exists(), job.warned, allocation.restarts, most, began_at, latest_step(run_dir)
    )
    say(why)
    if again and not job.cancelled:
        # It ends this script, scontrol included, and the script's own status then does not count.
        if not requeue(allocation.job_id, list(_known_faults(run_dir, faults)[0])):
            say("it could not be requeued (only what sbatch submitted can be): start it again")
        elif not job.cancelled:
            signal.pause()
    sys.exit(0 if (run_dir / "done").exists() else status or 1)


def help_page() -> str:
    """This module's docstring, and the arguments of the training."""
    usage = f"python -m launch.slurm.batch +experiment=NAME [key=value ...]\n{QUIET_LINE}"
    return f"{__doc__}\nusage: {usage}\n\n{training_help()}"


def main(argv: list[str] | None = None) -> None:
    run_command(batch, help_page, argv)


if __name__ == "__main__":
    main()
