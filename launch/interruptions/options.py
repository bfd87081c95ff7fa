"""The arguments of `python -m launch.lifetime` beside those of a training, with their sources; no torch."""

from dataclasses import dataclass

from data.checks import check_at_least, check_choice
from data.cli import location
from launch.cost.options import PlanOptions

# Faults per 1,000 node-days, all kinds together, at which the page looks.
# Source: 2.34 and 6.50 hardware failures on two clusters of 8 GPUs a node in 11 months, Kokolis et al. 2024, arXiv
# 2410.21680. The last is four times 6.5: many interruptions are no hardware failures.
COMPARED = (2.34, 6.5, 26.0)
RESTARTS = ("in_place", "requeue")
PLAN = PlanOptions()


@dataclass(slots=True)
class LifetimeOptions:
    """Simulate a training with its faults by events: effective training time, steps redone, GPU-hours lost by cause.

    Rates are per 1,000 node-days. By default they add up to 6.5 (Kokolis et al. 2024), shared out as the 419 unexpected
    interruptions of Llama 3 (2024, table 5).

    node_faults: a rank dies and its node is of no more use: GPUs, memory, power, maintenance (308 of 419).
    process_faults: a rank dies and its node is well: software (56 of 419).
    link_faults: a node's network is gone and all ranks wait (42 of 419).
    hangs: all ranks wait though no node is at fault (7 of 419).
    corruptions: a node computes wrongly (6 of 419).
    restart: in_place starts again on the nodes at hand, requeue gives all nodes back after each fault.
    spares: nodes more in the allocation, which wait to take over.
    shared_compile_cache: what torch.compile wrote on one node is there on all (train/faults/compile_cache.py).
    job_hours: time limit of the job, as in launch/slurm/train.sbatch; 0 for none.
    queue_minutes: mean wait of a requeued job in the queue, beyond Slurm's own two minutes.
    detect_seconds: from the death of a rank to the end of all.
    start_seconds: from there to the first step, but for loading and compiling.
    compile_seconds: the first step, with nothing in the cache of torch.compile.
    cached_share: share of it that is left with a cache.
    memory_every: steps between copies of the state in a neighbour's memory; 0 for none, which is what there is.
    storage: GB/s at which all nodes together read and write checkpoints.
    host_copy: GB/s at which a rank copies its part of a checkpoint to the host, while the training stands still.
    step_seconds: seconds of a step; 0 takes those of launch.plan.
    gpu, nodes, gpus_per_node, link, mfu, samples: as launch.plan has them.
    runs: runs that are simulated, each from a seed of its own.
    chart: a PNG to draw the share over save_every, and the lost hours, into.
    """

    node_faults: float = 4.78
    process_faults: float = 0.87
    link_faults: float = 0.65
    hangs: float = 0.11
    corruptions: float = 0.09
    restart: str = "in_place"
    spares: int = 0
    shared_compile_cache: bool = True
    job_hours: float = 24.0
    queue_minutes: float = 10.0
    detect_seconds: float = 20.0
    start_seconds: float = 60.0
    compile_seconds: float = 600.0
    cached_share: float = 0.04
    memory_every: int = 0
    storage: float = 10.0
    host_copy: float = 2.0
    step_seconds: float = 0.0
    gpu: str = PLAN.gpu
    nodes: int = PLAN.nodes
    gpus_per_node: int = PLAN.gpus_per_node
    link: float = PLAN.link
    mfu: float = PLAN.mfu
    samples: int = PLAN.samples
    runs: int = 200
    chart: str = location("")

    @property
    def plan(self) -> PlanOptions:
        return PlanOptions(self.gpu, self.nodes, self.gpus_per_node, self.link, mfu=self.mfu, samples=self.samples)

    @property
    def rates(self) -> dict[str, float]:
        """Faults per 1,000 node-days, by kind."""
        return {kind: getattr(self, name) for kind, name in KINDS.items()}


# The kinds of faults, as the page calls them, by their rates.
KINDS = {
    "node": "node_faults",
    "process": "process_faults",
    "link": "link_faults",
    "hang": "hangs",
    "corruption": "corruptions",
}


def check_options(options: LifetimeOptions) -> None:
    """Raises: ValueError that names the argument."""
    check_choice("restart", options.restart, RESTARTS)
    for name in (*KINDS.values(), "spares", "job_hours", "queue_minutes", "detect_seconds", "start_seconds",
                 "compile_seconds", "cached_share", "memory_every", "step_seconds"):  # fmt: skip
        check_at_least(name, getattr(options, name), 0)
    for name in ("runs", "samples"):
        check_at_least(name, getattr(options, name), 1)
    for name in ("storage", "host_copy"):
        check_at_least(name, getattr(options, name), 0.001)
    if not sum(options.rates.values()):
        raise ValueError(f"{', '.join(KINDS.values())} are all 0: without faults there is nothing to simulate")
    if options.cached_share > 1:
        raise ValueError(f"cached_share={options.cached_share} must lie between 0 and 1")
    if options.job_hours and options.job_hours < 1:
        raise ValueError(f"job_hours={options.job_hours} must be at least 1, or 0 for no limit")
