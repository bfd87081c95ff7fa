"""Checks every node before a training: `deepspeed --module launch.preflight OVERRIDES`, by the training's launcher.

Takes the arguments of train/main.py beside its own. launch/slurm/batch.py runs it on all nodes before a first start.
Exit status 2 and a line for each fault, which names the node and the remedy.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from data.checks import count
from data.cli import MISTAKE, run_command
from launch.cost.options import PlanOptions
from launch.nodes.cpus import Cpus, cpu_faults, find_cpus
from train.compose import help_with_training, parse_with_config
from train.config import Config, check_accumulation
from train.faults.launched import check_launched
from train.faults.quarantine import node_name, record_node_fault

# A healthy pair of nodes may be this many times slower than the median before it is named.
SLOW_PAIR = 3.0


@dataclass(slots=True)
class Options:
    """Checks every node before a training: code, packages, GPUs, CPUs, clocks, disk space, storage and network.

    step_seconds: seconds that the plan says a step takes; data must be read fast enough for it.
    max_skew: largest difference between clocks, in seconds.
    test_mb: MB of the messages that measure the network.
    spares: nodes among them that wait to take over, and have no part of the batch.
    """

    step_seconds: float = 0.5
    max_skew: float = 2.0
    test_mb: int = 64
    spares: int = 0


@dataclass(slots=True)
class Report:
    """What one rank found.

    cpus: those that it may use, of the node's; all of its loader workers share them.  faults: what is wrong there,
    whatever the other ranks find.
    """

    node: str
    local_rank: int
    code: str
    versions: dict[str, str]
    devices: str
    cpus: Cpus
    read_rate: float = 0.0
    faults: list[str] = field(default_factory=list)


def look(options: Options, config: Config, ranks: int, nodes: int) -> Report:
    """What a rank can find by itself; the checks of the node are done by its first rank."""
    from launch.cost.estimate import estimate_reading
    from launch.nodes.checks import code_hash, devices, disk_faults, open_files_faults, read_rate, versions

    local_rank = int(os.environ["LOCAL_RANK"])
    node = node_name()
    seen, faults = devices(local_rank)
    report = Report(node, local_rank, code_hash(), versions(), seen, find_cpus(), faults=faults)
    if local_rank == 0:
        reading = estimate_reading(PlanOptions(), config)
        needed = reading.sample * config.global_batch / options.step_seconds / nodes
        report.read_rate, faults = read_rate(config, needed)
        report.faults += faults + disk_faults(config, ranks) + open_files_faults(config, ranks)
    return report


def training_ranks(ranks: int, nodes: int, spares: int) -> int:
    """How many of the ranks train where so many of the nodes wait.  Raises: ValueError if none does."""
    if not 0 <= spares < nodes:
        raise ValueError(f"spares={spares} must be a number below the {nodes} nodes that are checked")
    return ranks // nodes * (nodes - spares)


def compare(reports: list[Report]) -> list[str]:
    """The faults of all ranks, and those whose code, packages or devices differ from most others'."""
    faults = [f"{r.node}, rank {i}: {fault}" for i, r in enumerate(reports) for fault in r.faults]
    usual_code = Counter(r.code for r in reports).most_common(1)[0][0]
    other = {r.node: r.code for r in reports if r.code != usual_code}
    faults += [
        f"{node}: other code ({code[:12]}, the others have {usual_code[:12]}): update the checkout there, or put it on "
        "storage that all nodes share"
        for node, code in other.items()
    ]
    for name in reports[0].versions:
        usual = Counter(r.versions.get(name, "none") for r in reports).most_common(1)[0][0]
        differing = {r.node: r.versions.get(name, "none") for r in reports if r.versions.get(name, "none") != usual}
        faults += [
            f"{node}: {name} {version}, the others have {usual}: install the same environment there (`make install`)"
            for node, version in differing.items()
        ]
    kinds = Counter(r.devices for r in reports).most_common()
    faults += [
        f"{r.node}, rank {i}: {r.devices}, the others have {kinds[0][0]}: repair it, or sbatch --exclude={r.node}"
        for i, r in enumerate(reports)
        if r.devices != kinds[0][0]
    ]
    return faults


def slow_pairs(rates: dict[tuple[str, str], float]) -> list[str]:
    """A line for each pair of nodes whose rate is far below the median."""
    if not rates:
        return []
    usual = median(rates.values())
    return [
        f"{a} and {b}: {rate / 1e9:.2f} GB/s between them, the median is {usual / 1e9:.2f}: look at their links, or "
        "leave out the one that is in more such lines, with sbatch --exclude"
        for (a, b), rate in rates.items()
        if rate * SLOW_PAIR < usual
    ]


def preflight(argv: list[str]) -> None:
    """Exits: 2 if there is any fault.  Raises: ValueError for arguments that cannot be."""
    options, config = parse_with_config(Options, argv)
    # Imported here, since torch takes seconds.
    import torch.distributed as dist

    from data.device import check_device
    from launch.nodes.checks import shared_run_dir_faults
    from launch.nodes.network import all_reduce_rate, clock_offsets, meet_by_gloo, pair_rates
    from train.engine import init_distributed
    from train.inputs import resolve_text_shape

    check_launched(os.environ)
    check_device(config.needs_gpu)
    rank, ranks, device = init_distributed(config.hang_seconds)
    meet_by_gloo()
    resolve_text_shape(config)
    names: list = [None] * ranks
    dist.all_gather_object(names, node_name())
    nodes = len(set(names))
    check_accumulation(config, training_ranks(ranks, nodes, options.spares))
    reports: list = [None] * ranks
    dist.all_gather_object(reports, look(options, config, ranks, nodes))
    shared = shared_run_dir_faults(config, names)
    offsets = clock_offsets()
    whole = all_reduce_rate(device, options.test_mb)
    rates = pair_rates(device, options.test_mb, names)
    faults: list[str] = []
    if rank == 0:
        cpus = {name: [report.cpus for report in reports if report.node == name] for name in names}
        faults = compare(reports) + cpu_faults(cpus, config.data.workers) + shared + slow_pairs(rates)
        middle = median(offsets)
        faults += [
            f"{name}: its clock is {offset - middle:+.1f} s off: start chrony or ntpd there"
            for name, offset in dict(zip(names, offsets, strict=True)).items()
            if abs(offset - middle) > options.max_skew
        ]
        summary(reports, whole, rates, faults)
        record(Path(config.run_dir), set(names), faults)
    to_all = [faults]
    dist.broadcast_object_list(to_all, src=0)
    dist.barrier()
    dist.destroy_process_group()
    if to_all[0]:
        sys.exit(MISTAKE)


def record(run_dir: Path, nodes: set[str], faults: list[str]) -> None:
    """Count the faults of single nodes, for the batch script to leave out those that fail again and again.

    What most nodes have is wrong with the job, and a slow pair of nodes does not tell which of them is the slow one.
    """
    told = {node: [fault for fault in faults if fault.startswith((f"{node}:", f"{node}, rank "))] for node in nodes}
    bad = {node: of_node[0] for node, of_node in sorted(told.items()) if of_node}
    if len(bad) * 2 <= len(nodes):
        for node, fault in bad.items():
            record_node_fault(run_dir, node, "preflight", fault)


def summary(reports: list[Report], whole: float, rates: dict[tuple[str, str], float], faults: list[str]) -> None:
    """Print what was measured, and the faults on stderr."""
    nodes = list(dict.fromkeys(r.node for r in reports))
    print(f"{count(len(reports), 'rank')} on {count(len(nodes), 'node')}; {reports[0].devices}; {reports[0].versions}")
    print(f"all-reduce among all: {whole / 1e9:.2f} GB/s of bus bandwidth")
    if rates:
        slowest = min(rates, key=lambda pair: rates[pair])
        print(f"slowest pair of nodes: {' and '.join(slowest)}, {rates[slowest] / 1e9:.2f} GB/s each way")
    first = [r for r in reports if r.local_rank == 0]
    least = min(first, key=lambda r: r.read_rate)
    print(f"data and embeddings: {least.node} reads slowest, {least.read_rate / 1e6:.1f} MB/s")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print("every node is ready" if not faults else f"{count(len(faults), 'fault')}, see above")


def main(argv: list[str] | None = None) -> None:
    run_command(preflight, lambda: help_with_training(Options, "deepspeed --module launch.preflight"), argv)


if __name__ == "__main__":
    main()
