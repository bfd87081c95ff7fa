"""A training whose sample grid, or whose saves, are slow: slow_run.py WHAT SECONDS OVERRIDES, as train/main.py.

WHAT: sample (SECONDS for each denoising step), save (SECONDS for a rank's file to reach the disk) or first (the first
micro batch, as if the net were compiled).
Prints the limit of each process group at the end, once.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch.distributed.distributed_c10d as c10d

import train.checkpoint.new_folder as new_folder
import train.loop as loop
import train.sampling.sampler as sampler
from data.cli import arguments
from data.storage.machine import open_handles
from train.main import main


def slow(what: str, seconds: float) -> None:
    """Make the one or the other slow."""
    if what == "save":
        flush = new_folder.flush_to_disk

        def flush_slowly(path: Path) -> None:
            if path.suffix == ".safetensors":
                time.sleep(seconds)
            flush(path)

        new_folder.flush_to_disk = flush_slowly
    elif what == "first":
        losses = loop.training_losses

        def losses_after_a_while(*arguments):
            time.sleep(seconds)
            loop.training_losses = losses
            return losses(*arguments)

        loop.training_losses = losses_after_a_while
    else:
        sample = sampler.sample

        def sample_slowly(*arguments):
            *rest, after_step = arguments

            def after_slow_step(step: sampler.SamplingStep) -> None:
                time.sleep(seconds)
                after_step(step)

            return sample(*rest, after_slow_step)

        sampler.sample = sample_slowly


def tell_limits() -> None:
    """The limit of each process group, as its backend has it."""
    groups = c10d._world.pg_map
    limits = {group._get_backend(c10d.torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    print(f"{len(groups)} groups wait {sorted(limits)} s, {open_handles()} handles", flush=True)


class Leaving(loop.Watchdog):
    """The loop's last call is its stop."""

    def stop(self) -> None:
        if not self._rank:
            tell_limits()
        super().stop()


if __name__ == "__main__":
    what, seconds, *overrides = arguments(None)
    slow(what, float(seconds))
    loop.Watchdog = Leaving
    main(overrides)
