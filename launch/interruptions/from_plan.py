"""The run that is simulated, its numbers from the plan and the configuration."""

from dataclasses import replace

from launch.cost.estimate import GB, estimate_step
from launch.interruptions.events import Life
from launch.interruptions.options import LifetimeOptions, check_options
from train.config import Config
from train.inputs import resolve_sizes

DAY = 86_400


def make_life(options: LifetimeOptions, config: Config) -> tuple[Life, str]:
    """The run of a configuration on the nodes of the options, and which of its sizes follow the data, in a line.

    Raises: ValueError for a value that cannot be, or a micro batch that does not divide the batch.
    """
    check_options(options)
    if options.corruptions and not config.check_every:
        raise ValueError("check_every=0 finds no corruption, so no time of it is known: set corruptions=0 as well")
    sizes = resolve_sizes(config, options.samples)
    step, checkpoint = estimate_step(options.plan, config)
    through_storage = checkpoint / (options.storage * GB)
    life = Life(
        steps=config.steps,
        step=options.step_seconds or step,
        save_every=config.save_every,
        copy=checkpoint / options.plan.ranks / (options.host_copy * GB),
        write=through_storage,
        rates={kind: rate / 1000 * options.nodes / DAY for kind, rate in options.rates.items()},
        hang=config.hang_seconds,
        end=options.detect_seconds,
        start=options.start_seconds,
        load=2 * through_storage,  # its hashes are checked first
        compiling=options.compile_seconds if config.compile else 0.0,
        cached=options.compile_seconds * options.cached_share if config.compile else 0.0,
        job=options.job_hours * 3600,
        queue=options.queue_minutes * 60,
        in_place=options.restart == "in_place",
        spares=options.spares,
        shared_cache=options.shared_compile_cache,
        check_every=config.check_every or 1,  # without checks no corruption is simulated
        memory_every=options.memory_every,
    )
    return life, sizes


def with_faults(life: Life, options: LifetimeOptions, per_1000: float) -> Life:
    """The same with so many faults per 1,000 node-days in all, their kinds in the same shares."""
    times = per_1000 / sum(options.rates.values())
    return replace(life, rates={kind: rate * times for kind, rate in life.rates.items()})
