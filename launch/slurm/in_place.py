"""Which nodes of its own allocation a training starts on, and starts again on after a fault."""

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.cli import CORRUPTED, LOST, MISTAKE, REQUEUE
from launch.slurm.allocation import Allocation, expand_nodelist

# Starts in a row that may end without a later checkpoint. Between them Slurm has time to see that a node is gone, which
# takes its SlurmdTimeout (300 s by default).
TRIES, SETTLE_SECONDS = 3, 150.0
# With fewer of the nodes than this a requeue is faster than to go on.
LEAST_SHARE = 0.75
# States of a node of the job that can run something. A * behind it says that the node does not respond.
USABLE = {"allocated", "mixed", "idle", "completing", "draining"}
# What sinfo writes behind a state that changes nothing here: of power, of reservations, of what it plans.
FLAGS = "$-+@^!%#~"
# What the launcher of a node leaves beside its log (NODE in launch/slurm/batch.py): its status, when it ended, and
# whether it was asked to.
TOLD = re.compile(r"(\d+) (\d+\.\d+) ([01])\n")


@dataclass(frozen=True, slots=True)
class End:
    """How the launcher of a node ended.  asked: by SIGTERM, as Slurm sends once another one has ended."""

    status: int
    time: float
    asked: bool


def spare_nodes(environment: Mapping[str, str], nodes: int) -> int:
    """SPARES: how many nodes of the allocation wait to take over; 0 if it is not set.

    Raises: ValueError if it is no number, or leaves no node to train on.
    """
    spares = environment.get("SPARES") or "0"
    if not spares.isdigit() or int(spares) >= nodes:
        raise ValueError(f"SPARES={spares} must be a number below the {nodes} nodes of the job: those that wait")
    return int(spares)


def usable_nodes(allocation: Allocation) -> list[str]:
    """The nodes on which Slurm can run a step of the job, as it knows so far; all of them if it cannot be asked.

    A node that went down is no longer the job's, even if it comes back.
    """
    of_job = _ask("squeue", f"--jobs={allocation.job_id}", "--format=%N")
    still = set(expand_nodelist(of_job.strip())) if of_job.strip() else set(allocation.nodes)
    states = _ask("sinfo", "--Node", f"--nodes={','.join(allocation.nodes)}", "--format=%N %T").splitlines()
    # A node may be in several partitions, each with a line.
    out = {line.split()[0] for line in states if line.split()[1].rstrip(FLAGS) not in USABLE}
    return [node for node in allocation.nodes if node in still - out]


def _ask(*command: str) -> str:
    return subprocess.run([*command, "--noheader"], capture_output=True, text=True, check=False).stdout


def read_ends(log: str, nodes: Iterable[str]) -> dict[str, End]:
    """How the launchers of the nodes ended, of those that told; what they told is removed.

    log: where the logs of the nodes lie, without -NODE.log.
    """
    ends = {}
    for node in nodes:
        path = Path(f"{log}-{node}.status")
        if path.exists() and (told := TOLD.fullmatch(path.read_text())):
            ends[node] = End(int(told[1]), float(told[2]), told[3] == "1")
        path.unlink(missing_ok=True)
    return ends


def first_to_fail(ends: Mapping[str, End]) -> str:
    """The node whose launcher ended first by itself, of those whose ranks did not end because another was gone.

    '' if there is none, or the ranks found a device that makes errors, which they have counted already.
    """
    if any(end.status == CORRUPTED for end in ends.values()):
        return ""
    failed = {node: end for node, end in ends.items() if end.status not in (0, MISTAKE, LOST, REQUEUE)}
    return min(failed, key=lambda node: (failed[node].asked, failed[node].time), default="")


def choose_nodes(
    nodes: list[str], usable: list[str], failed: Mapping[str, int], wanted: int, fits: Callable[[int], bool]
) -> list[str]:
    """The nodes of the next start, in Slurm's order; [] if too few are left.

    The more often a node failed, the later it is taken. Where fewer than wanted are left, as many as the batch
    can be divided among, if those are not too few.
    failed: how often, by node.  fits: whether the batch can be divided among so many nodes.
    """
    in_turn = sorted(usable, key=lambda node: failed.get(node, 0))  # stable
    least = LEAST_SHARE * wanted
    number = next((n for n in range(min(wanted, len(usable)), 0, -1) if n == wanted or (n >= least and fits(n))), 0)
    return [node for node in nodes if node in in_turn[:number]]
