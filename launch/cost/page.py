"""The plan as a page of plain text."""

from data.loader.held_out import micro_batches
from launch.cost.estimate import GB, Plan, Times
from train.adam_state import FP32
from train.config import summed_in
from train.evaluation.validation import TIMESTEPS
from train.monitor.gpus import NODE_LINKS
from train.monitor.memory import ALIGNMENT, BUCKETS, WEIGHT_BYTES, averages_of, partition, snapshot_bytes
from train.summary import validation_share
from train.weights.power_average import TRACKED

# Gbit/s of a node's link at which the step is compared, beside that of the options.
COMPARED = (200, 800, 1600)

DAY = 86_400
FLOP_UNITS = (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


def render(plan: Plan) -> str:
    """The page: what was counted, where the bottleneck lies, and what was assumed."""
    parts = (head, memory, work, communication, buckets, reading, checkpoints, time, links, assumptions)
    return "\n\n".join("\n".join(lines) for lines in (part(plan) for part in parts) if lines)


def row(name: str, *cells: str, width: int = 18) -> str:
    """A line of a table."""
    return (f"{name:<42}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()


def gb(value: float) -> str:
    """Bytes as GB, or as MB if they are few: a large run splits its states into small parts."""
    return f"{value / GB:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.2f} MB"


def flop(value: float) -> str:
    """FLOP in the unit that suits their number."""
    unit, size = next((unit for unit in FLOP_UNITS if value >= unit[1]), FLOP_UNITS[-1])
    return f"{value / size:.4g} {unit}"


def digits(value: float) -> str:
    """A number with all its digits if it is large, otherwise with three."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def head(plan: Plan) -> list[str]:
    """The run and the machines."""
    options, config = plan.options, plan.config
    return [
        f"{plan.parameters:,} parameters, {config.precision}, {config.optim.name}, ZeRO-1",
        f"{options.nodes} nodes x {options.gpus_per_node} {options.gpu} = {options.ranks} ranks; batch "
        f"{config.global_batch} = {options.ranks} x {config.micro_batch} micro batch x {plan.accumulate} accumulation"
        f"{summed_in(config, plan.accumulate)}; {config.steps:,} steps",
        *([plan.sizes] if plan.sizes else []),
    ]


def memory(plan: Plan) -> list[str]:
    """Memory of one GPU, by part, for each choice of recomputation."""
    resident, costs, ranks = plan.states, plan.costs.values(), plan.options.ranks
    weight_bytes = WEIGHT_BYTES[plan.config.precision]
    reserve = plan.options.reserve_gb * GB
    total, built = [resident.total + cost.peak.most + reserve for cost in costs], plan.construction + reserve
    averages = "EMA" if averages_of(plan.config) == 1 else f"EMA and {len(TRACKED)} averages"
    return [
        row("MEMORY OF A GPU", gb(plan.gpu.memory)),
        row("weights", gb(resident.weights)),
        row(f"fp32 masters, 1/{ranks}: {partition(plan.parameters, ranks):,}", gb(resident.master)),
        row(f"moments of {plan.config.optim.name}, 1/{ranks}", gb(resident.moments)),
        row(f"{averages}, fp32, 1/{ranks}", gb(resident.ema)),
        row("gradients, where they accumulate", gb(weight_bytes * plan.parameters)),
        row(f"{BUCKETS} buckets of the all-reduce", gb(BUCKETS * weight_bytes * plan.largest)),
        row("reserve", gb(reserve)),
        "",
        row(f"recompute, micro batch {plan.config.micro_batch}", *plan.costs),
        row("activations kept for backward", *(gb(cost.step.kept) for cost in costs)),
        row("backward: activations, gradients, buckets", *(gb(cost.peak.backward) for cost in costs)),
        row("update: gradients, the part in fp32", *(gb(cost.peak.update) for cost in costs)),
        row("in all", *map(gb, total)),
        row("construction, in fp32, with the reserve", *[gb(built)] * len(total)),
        row("fits", *("yes" if max(t, built) <= plan.gpu.memory else "NO" for t in total)),
        row("largest micro batch that fits", *(str(cost.largest) for cost in costs)),
        row("  and divides the batch", *(str(cost.largest_dividing or "none") for cost in costs)),
    ]


def work(plan: Plan) -> list[str]:
    """Floating-point operations."""
    more = [f"{cost.flops.total / plan.flops.total - 1:+.1%}" for cost in plan.costs.values()]
    return [
        row("FLOPS"),
        row("forward, of an image", flop(plan.flops.forward)),
        row("forward and backward, of a step", flop(plan.model_flops)),
        row("the run", flop(plan.model_flops * plan.config.steps)),
        row("computed again, by recompute as above", *more),
        *validation(plan),
    ]


def validation(plan: Plan) -> list[str]:
    """The forward passes of the validations, if there are any; the samples are taken to be there."""
    config, samples = plan.config, plan.config.data.validation.samples
    if not config.validate_every:
        return []
    forwards = TIMESTEPS * micro_batches(samples, config.micro_batch, plan.options.ranks)
    return [
        row(
            f"a validation, every {config.validate_every:,} steps",
            flop(TIMESTEPS * samples * plan.flops.forward),
            f"{validation_share(config, samples):.2%} of the run",
            f"{forwards:,} forwards a rank",
            width=24,
        )
    ]


def communication(plan: Plan) -> list[str]:
    """What collectives move, and the time it takes at each rate of a node's link."""
    traffic, options = plan.collectives, plan.options
    lines = [
        row("COMMUNICATION, A STEP"),
        row("all-reduce of the gradients", gb(traffic.reduced), f"{len(plan.buckets[0].filled)} buckets"),
        row("all-gather of the weights", gb(traffic.gathered)),
        row("sent by each GPU, around a ring", gb(traffic.sent)),
    ]
    if options.ranks == 1:
        return [*lines, "one GPU: nothing is sent"]
    lines.append(row("", "all-reduce", "hidden", "exposed", "all-gather", width=19))
    for link in compared(plan, NODE_LINKS):
        network = plan.networks[link]
        rate = traffic.sent_reducing / network.all_reduce  # bytes/s that collectives reach
        seconds = (network.all_reduce, network.hidden, network.exposed, network.all_gather)
        lines.append(row(link_name(plan, link), *(f"{value:.3f} s, {gb(value * rate)}" for value in seconds), width=19))
    return lines


def compared(plan: Plan, links: tuple[int, ...]) -> list[float]:
    """Gbit/s of a node's link: these and that of the options; within one node there is nothing to compare."""
    return sorted({*links, plan.options.link}) if plan.options.nodes > 1 else [plan.options.link]


def link_name(plan: Plan, link: float) -> str:
    return f"at {link:g} Gbit/s a node" if plan.options.nodes > 1 else "within the node"


def buckets(plan: Plan) -> list[str]:
    """What larger buckets would cost, and room for all, with which the backward would never wait."""
    if plan.options.ranks == 1:
        return []
    links = compared(plan, COMPARED)
    header = [f"at {link:g}" if plan.options.nodes > 1 else "exposed" for link in links]
    lines = [row("BUCKETS, s of the all-reduce exposed", "memory", "all-reduces", *header)]
    for multiple in plan.buckets:
        number = "all" if multiple is plan.buckets[-1] else str(BUCKETS)
        name = f"{number} of {multiple.elements:,}" + (
            " elements, as configured" if multiple is plan.buckets[0] else ""
        )
        exposed = [f"{multiple.networks[link].exposed:.3f} s" for link in links]
        lines.append(row(name, gb(multiple.memory), str(len(multiple.filled)), *exposed))
    return lines


def reading(plan: Plan) -> list[str]:
    """Images and embeddings."""
    config, per = plan.config, plan.reading
    rate, nodes = config.global_batch / plan.times.step, plan.options.nodes
    source = "found in data.shards" if per.counted else "assumed"
    images = config.steps * config.global_batch
    lines = [
        row(
            f"DATA, {per.samples:,} samples {source}", "a sample", "a second", "a second, node", "stored", "read in all"
        ),
    ]
    for name, size in (("images", per.image), ("embeddings", per.embedding)):
        cells = (
            f"{size / 1e3:,.1f} KB",
            gb(size * rate),
            gb(size * rate / nodes),
            f"{size * per.samples / 1e12:,.2f} TB",
        )
        lines.append(row(name, *cells, f"{size * images / 1e12:,.2f} TB"))
    lines += [
        row("images per second", "", f"{rate:,.0f}", f"{rate / nodes:,.0f}"),
        row("epochs", f"{images / per.samples:,.2f}"),
    ]
    return lines


def checkpoints(plan: Plan) -> list[str]:
    """Size, number and period of the checkpoints."""
    config, ranks = plan.config, plan.options.ranks
    every = config.save_every * plan.times.step
    return [
        row("CHECKPOINTS"),
        row("one", gb(plan.checkpoint), f"{gb(plan.checkpoint / ranks)} a rank"),
        row(
            f"{config.keep_checkpoints} and one being written",
            gb((config.keep_checkpoints + 1) * plan.checkpoint),
        ),
        row(f"one every {config.save_every:,} steps", f"{every / 60:,.1f} min"),
        *snapshots(plan),
    ]


def snapshots(plan: Plan) -> list[str]:
    """What averages of any length take, or would take."""
    every, ranks = plan.config.ema_snapshot_every, plan.options.ranks
    one, more = ranks * snapshot_bytes(plan.parameters, ranks), FP32 * len(TRACKED) * partition(plan.parameters, ranks)
    if not every:
        return [
            row("averages of any length, ema_snapshot_every=0", "none"),
            row("  they would take", f"{gb(more)} a GPU", f"{gb(ranks * more)} a checkpoint", f"{gb(one)} a snapshot",
                width=26),
        ]  # fmt: skip
    number = plan.config.steps // every
    return [
        row(f"a snapshot of averages every {every:,} steps", gb(one), f"{gb(one / ranks)} a rank"),
        row(f"all {number:,} of the run, which stay", gb(number * one)),
    ]


PARTS = {"all_reduce": "all-reduce of the gradients, exposed", "all_gather": "all-gather of the weights"}


def time(plan: Plan) -> list[str]:
    """Time of a step, days and GPU-hours: before and after the overlap, and at the physical limit."""
    options = plan.options
    each = (plan.nothing_hidden(options.link), plan.times, plan.limit)
    lines = [
        row(f"TIME, MFU {options.mfu:.0%}, {link_name(plan, options.link)}", "nothing hidden", "overlapped", "limit")
    ]
    for name in ("compute", "all_reduce", "all_gather", "update", "reading"):
        hidden = name in ("all_reduce", "all_gather", "update")
        cells = [f"{getattr(t, name):.3f} s" if getattr(t, name) else "-" for t in each]
        lines.append(row(PARTS.get(name, name), *cells[:2], "hidden" if hidden else cells[2]))
    steps, gpus = plan.config.steps, options.ranks
    lines += [
        row("step", *(f"{t.step:.3f} s" for t in each)),
        row("steps a day", *(f"{DAY / t.step:,.0f}" for t in each)),
        row("days", *(digits(steps * t.step / DAY) for t in each)),
        row("GPU-hours", *(digits(gpus * steps * t.step / 3600) for t in each)),
        row("MFU of the whole step", *(f"{mfu(plan, t):.0%}" for t in each)),
        row("bottleneck", bottleneck(plan)),
    ]
    return lines


def links(plan: Plan) -> list[str]:
    """The run before and after the overlap, at each rate of a node's link."""
    options = plan.options
    if options.nodes == 1:
        return []
    both = ("step", "days", "GPU-hours")
    lines = [
        row("BY LINK", "nothing hidden", "", "", "overlapped", width=14),
        row("", *both, *both, "saved", width=14),
    ]
    for link in compared(plan, COMPARED):
        before, after = plan.nothing_hidden(link).step, plan.overlapped(link).step
        cells = []
        for step in (before, after):
            seconds = plan.config.steps * step
            cells += [f"{step:.3f} s", digits(seconds / DAY), digits(options.ranks * seconds / 3600)]
        lines.append(row(link_name(plan, link), *cells, f"{1 - after / before:.0%}", width=14))
    return lines


def mfu(plan: Plan, times: Times) -> float:
    """FLOP of a step, without what is computed again, over what the GPUs could do in its time."""
    return plan.model_flops / (times.step * plan.options.ranks * plan.gpu.tflops * 1e12)


def bottleneck(plan: Plan) -> str:
    """The part that takes longest, its share of the step, and the rate at which storage must be read for no wait."""
    name = plan.times.bottleneck
    share = getattr(plan.times, name) / plan.times.step
    rate = plan.reading.sample * plan.config.global_batch / plan.times.step
    hint = "" if plan.options.storage else " (storage=GB/s checks it)"
    return f"  {name}, {share:.0%} of the step; storage must give {gb(rate)}/s{hint}"


def assumptions(plan: Plan) -> list[str]:
    """What was assumed, not counted."""
    options, gpu = plan.options, plan.gpu
    data = (
        "counted in the dataset"
        if plan.reading.counted
        else f"image_kb={options.image_kb:g}, samples={options.samples:,}"
    )
    text = f"{plan.config.data.tokens} x {plan.config.model.encoder_dim}"
    return [
        "ASSUMED",
        f"  {options.gpu}: {gpu.tflops:g} TFLOP/s dense bf16, {gpu.memory / 2**30:.0f} GiB, "
        f"{gpu.memory_rate / 1e12:g} TB/s, {gpu.link_rate / GB:g} GB/s to its neighbours (data sheets)",
        f"  mfu={options.mfu:g}: not measured here; `make gpu-check` measures it on your GPU",
        f"  link={options.link:g} Gbit/s a node each way, of which collectives reach link_efficiency="
        f"{options.link_efficiency:g}",
        "  all-reduces go beside the backward and slow none of its kernels; its time is shared out by FLOP. When a",
        "  bucket is full, the backward waits until the one before is sent, as with DeepSpeed",
        f"  reserve_gb={options.reserve_gb:g} for CUDA, NCCL, cuDNN's workspaces and fragments",
        f"  data: {data}; embeddings as data.embed stores them"
        + (f", {text} as T5-XXL's" if plan.assumed_text else ""),
        f"  weights padded to {ALIGNMENT} x the ranks; a bucket holds {plan.largest:,} elements, the largest parameter",
        "  activations: eager; torch.compile may keep less. At the limit: peak FLOP/s, communication hidden behind it",
    ]
