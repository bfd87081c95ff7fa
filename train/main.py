"""The command: `deepspeed train/main.py +experiment=smoke`. Composes and checks the configuration, then trains."""

import faulthandler
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# The launcher runs this file as a script, which puts train/ first on the path; the packages lie one level up.
sys.path[0] = str(ROOT)
# It also appends --local_rank=N, which Hydra does not know; the rank is in the environment too.
sys.argv = [arg for arg in sys.argv if not arg.startswith("--local_rank")]

import hydra  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from data.loader.cursor import ShardUnreadable  # noqa: E402
from data.loader.workers import LoaderDied  # noqa: E402
from train.checkpoint.format import CheckpointFailed  # noqa: E402
from train.checkpoint.resume import check_resumable, check_same_everywhere  # noqa: E402
from train.config import Config, accumulation, check_nodes  # noqa: E402
from train.faults.preempt import REQUEUE, install_signal_handlers  # noqa: E402
from train.faults.run_lock import InUse, lock_run_dir  # noqa: E402
from train.inputs import find_inputs  # noqa: E402
from train.monitor.tracker import check_login  # noqa: E402
from train.summary import describe  # noqa: E402

# Not found by all ranks, so the one that meets it tells.
OF_ONE_RANK = (OSError, LoaderDied, ShardUnreadable)
# How gloo and NCCL say that another rank is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Exit status 2, and one line from rank 0, for what the user can mend; 75 when asked to leave before the end."""
    install_signal_handlers()
    faulthandler.enable()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = to_config(composed)
        if config.dry_run:
            if rank == 0:
                print(describe(config, ranks))
            return
        check_nodes(os.environ, ranks)
        accumulation(config, ranks)
        inputs = find_inputs(config, rank)
        check_resumable(config, inputs.samples)
        if rank == 0:
            check_login(config.wandb.mode)
    except ValueError as error:
        leave(error, rank)

    # Imported here: the engine takes seconds to import, and a mistake above is to be told at once.
    from train.engine import init_distributed
    from train.faults.guard import NotFinite, TooManyBad
    from train.loop import train

    try:
        rank, ranks, device = init_distributed()
        check_same_everywhere(config, inputs.datasets)
    except ValueError as error:
        leave(error, rank)
    try:
        if rank == 0:
            lock_run_dir(Path(config.run_dir))
        finished = train(config, inputs, rank, ranks, device)
    except (TooManyBad, NotFinite, CheckpointFailed, InUse, *OF_ONE_RANK) as error:
        leave(error, rank)
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        print(f"rank {rank}: ends, for another rank is gone; that one's own error is further up", file=sys.stderr)
        sys.exit(1)
    dist.barrier()  # a launcher ends the others as soon as one has left
    dist.destroy_process_group()
    if not finished:
        sys.exit(REQUEUE)


def to_config(composed: DictConfig) -> Config:
    """Hydra's composition as the typed configuration.

    Raises: ValueError for a value that cannot be, or that clashes with another; and for a key that the schema does not
    have, since Hydra itself lets +key=value add one.
    """
    try:
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except AttributeError as error:
        raise ValueError(f"no such key in the configuration: {error}; train/config.py has them all") from None


def leave(error: Exception, rank: int) -> NoReturn:
    """End this process for a mistake; those of the user are found by all ranks, and told by the first."""
    if rank == 0 or isinstance(error, OF_ONE_RANK):
        # What a loader worker raised comes with the worker's traceback before it.
        text = str(error)
        text = text.strip().splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
        print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
