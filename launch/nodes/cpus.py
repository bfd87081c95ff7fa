"""Whether the ranks of a node and their loader workers may use enough of its CPUs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data.checks import count


@dataclass(frozen=True, slots=True)
class Cpus:
    """The CPUs of one rank.

    bound: those that the kernel lets it run on.  given: how many Slurm gave the job on this node, which it may not
    enforce; None without Slurm.  of_node: how many the node has.
    """

    bound: frozenset[int]
    given: int | None
    of_node: int


def find_cpus(environment: Mapping[str, str] = os.environ) -> Cpus:
    """The CPUs of this process, which the loader workers that it starts inherit."""
    given = environment.get("SLURM_CPUS_ON_NODE", "")
    return Cpus(frozenset(os.sched_getaffinity(0)), int(given) if given.isdigit() else None, os.cpu_count() or 1)


def cpu_faults(nodes: Mapping[str, list[Cpus]], workers: int) -> list[str]:
    """A line for each node whose ranks have fewer CPUs than processes, though the node has more.

    nodes: by name, the CPUs of each of its ranks.  workers: loader workers of a rank.
    """
    return [f"{node}: {fault}" for node, ranks in nodes.items() if (fault := _node_fault(ranks, workers))]


def _node_fault(ranks: list[Cpus], workers: int) -> str:
    given, of_node = ranks[0].given, ranks[0].of_node
    wanted = min(len(ranks) * (1 + workers), of_node)
    beside = f", for {count(len(ranks), 'rank')} with {count(workers, 'loader worker')} each"
    if given is not None and given < wanted:
        return (
            f"Slurm gave the job {given} of the node's {of_node} CPUs{beside}: ask for more, with --exclusive or "
            f"--cpus-per-task={wanted}"
        )
    together = len(frozenset().union(*(rank.bound for rank in ranks)))
    if together < wanted:
        return (
            f"all that runs there is bound to {together} of the node's {of_node} CPUs{beside}: look for what binds it "
            "(taskset, a container's --cpuset-cpus, SLURM_CPU_BIND, SRUN_ARGS), and give it more"
        )
    least = min(range(len(ranks)), key=lambda i: len(ranks[i].bound))
    alone = min(1 + workers, of_node)
    if len(ranks[least].bound) < alone:
        return (
            f"its rank {least} is bound to {len(ranks[least].bound)} of the node's {of_node} CPUs, for itself and "
            f"{count(workers, 'loader worker')}: bind ranks to at least {alone} (--bind_core_list of the launcher)"
        )
    return ""
