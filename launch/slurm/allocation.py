"""The nodes that Slurm has allocated to this job, and checks that a training can start on them."""

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

NO_SLURM = (
    "this is no Slurm job (no SLURM_JOB_ID): submit one, `sbatch launch/slurm/train.sbatch +experiment=if_i_xl`, or "
    "allocate nodes with salloc; on a single machine `deepspeed train/main.py +experiment=...` is enough"
)
# Above the ports of services and below those that Linux assigns by itself (32768 and up).
FIRST_PORT, PORTS = 15_000, 15_000
# From the port of a start to that of the next; jobs that follow one another have ports that do.
PORT_STEP = 97


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a job.

    nodes: in the order of their ranks.  master_addr, master_port: where all ranks connect, on the first node.
    restarts: how many times Slurm has requeued this job.
    """

    job_id: str
    nodes: list[str]
    ranks_per_node: int
    master_addr: str
    master_port: int
    restarts: int

    @property
    def ranks(self) -> int:
        return len(self.nodes) * self.ranks_per_node

    def on(self, nodes: list[str], start: int) -> "Allocation":
        """The same job with some of its nodes.  start: how many came before; each has a port of its own."""
        port = self.master_port if not start else free_port(int(self.job_id) + PORT_STEP * start, None)
        return replace(self, nodes=nodes, master_addr=node_address(nodes[0]), master_port=port)

    def hostfile(self) -> str:
        """The hostfile of DeepSpeed."""
        return "".join(f"{node} slots={self.ranks_per_node}\n" for node in self.nodes)


def find_allocation(environment: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation that this process runs in.

    Raises: ValueError without Slurm; for a job array; if the port is taken or the environment has settings of another
    job.
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        raise ValueError(NO_SLURM)
    if "SLURM_ARRAY_TASK_ID" in environment:
        raise ValueError(
            f"job {job} is task {environment['SLURM_ARRAY_TASK_ID']} of an array, and all its tasks would write to one "
            "run_dir: submit it without --array; one job starts all nodes"
        )
    nodes = expand_nodelist(environment["SLURM_JOB_NODELIST"])
    master = environment.get("MASTER_ADDR", nodes[0])
    if master != nodes[0]:
        raise ValueError(
            f"MASTER_ADDR={master} is set, but job {job} begins on {nodes[0]}: unset it, it is of another job"
        )
    return Allocation(
        job_id=job,
        nodes=nodes,
        ranks_per_node=ranks_per_node(environment),
        master_addr=node_address(nodes[0]),
        master_port=free_port(int(job), environment.get("MASTER_PORT")),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def ranks_per_node(environment: Mapping[str, str]) -> int:
    """RANKS_PER_NODE, or else the number of GPUs that Slurm allocated on each node.

    Raises: ValueError if neither is set, or is not a number.
    """
    for name in ("RANKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        value = environment.get(name, "").rpartition(":")[2]  # may be a100:8
        if value:
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"{name}={environment[name]} must be a number of processes on each node, at least 1")
            return int(value)
    raise ValueError(
        f"job {environment['SLURM_JOB_ID']} has no GPUs (no SLURM_GPUS_ON_NODE): submit it with --gpus-per-node=8, or "
        "set RANKS_PER_NODE to train on CPUs"
    )


def expand_nodelist(nodelist: str) -> list[str]:
    """The names in a list such as node[1-3], in Slurm's order."""
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def node_address(node: str) -> str:
    """The address that Slurm has for a node; DNS may not resolve the name of the node."""
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True).stdout.split()
    known = [word.partition("=")[2] for word in shown if word.startswith("NodeAddr=")]
    return known[0] if known else node


def free_port(job: int, wanted: str | None) -> int:
    """A free port of this node, which is the job's first; it depends on the job's number, so that two jobs differ.

    wanted: MASTER_PORT, if it is set.
    Raises: ValueError if the wanted port is taken or not a port.
    """
    if wanted:
        if not wanted.isdigit() or not 1024 <= int(wanted) < 65536:
            raise ValueError(
                f"MASTER_PORT={wanted} must be a port from 1024 to 65535: unset it, and a free one is chosen"
            )
        if is_taken(int(wanted)):
            raise ValueError(
                f"MASTER_PORT={wanted} is taken on {socket.gethostname()}, by another job or its remains: "
                "unset it, and a free one is chosen"
            )
        return int(wanted)
    ports = (FIRST_PORT + (job + offset) % PORTS for offset in range(PORTS))
    return next(port for port in ports if not is_taken(port))


def is_taken(port: int) -> bool:
    """Whether a process listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def check_hostfile(path: Path, allocation: Allocation) -> None:
    """Check that a hostfile names the nodes of the allocation, in order, with their number of ranks.

    Raises: ValueError that names the first difference.
    """
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise ValueError(f"HOSTFILE={path} cannot be read: {error}; unset it, and one is written") from None
    named = [line[0] for line in lines]
    if named != allocation.nodes:
        missing = [node for node in allocation.nodes if node not in named]
        foreign = [node for node in named if node not in allocation.nodes]
        fault = f"lacks {missing[0]}" if missing else f"names {foreign[0]}" if foreign else "has them in another order"
        raise ValueError(
            f"HOSTFILE={path} disagrees with Slurm: job {allocation.job_id} has {len(allocation.nodes)} nodes, "
            f"the file {len(named)}, and {fault}: unset HOSTFILE, and one is written"
        )
    slots = {line[0]: line[1].partition("=")[2] for line in lines if len(line) > 1}
    other = [node for node in named if slots.get(node) != str(allocation.ranks_per_node)]
    if other:
        raise ValueError(
            f"HOSTFILE={path} gives {other[0]} slots={slots.get(other[0])}, Slurm {allocation.ranks_per_node}: unset "
            "HOSTFILE, and one is written"
        )


def check_commands(launcher: Path) -> None:
    """Check that Slurm's commands and DeepSpeed's launcher can be run.

    Raises: ValueError if not.
    """
    if not shutil.which("srun"):
        raise ValueError(
            f"`srun` is not on PATH of {socket.gethostname()}: load Slurm's module, or add its folder to PATH"
        )
    if not launcher.exists():
        raise ValueError(f"no '{launcher}': run `make install`, and start this command with the Python of .venv")
