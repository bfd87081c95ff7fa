"""Composes and checks the configuration, then trains: `deepspeed train/main.py +experiment=smoke`."""

import atexit
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # The launcher runs this file as a script, which puts train/ first on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from data.interrupt import handle_ctrl_c

    handle_ctrl_c()

from data.cli import CORRUPTED, HELP, LOST, MISTAKE, QUIET_LINE, REQUEUE, arguments, how_called, reason, without_quiet
from data.progress import LogLines, end_lines
from data.quiet import quiet_libraries
from data.storage.machine import check_open_files, raise_open_file_limit
from train.compose import compose_config, training_help
from train.config import Config, check_accumulation
from train.faults.launched import check_launched

if TYPE_CHECKING:
    from train.faults.node_watch import NodeWatch
    from train.inputs import Inputs

# What this process was given. What it adds is for its own libraries, and for what it starts itself.
ENVIRONMENT = dict(os.environ)
# How gloo and NCCL say that another rank is gone.
LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def main(argv: list[str] | None = None) -> None:
    """Exits: 2 with one line for what the user can fix; 75 when asked to leave before the end; 130 for Ctrl-C before
    the first step, or a second one; 76 when another rank is gone; 77 when a device makes errors.
    """
    # Of the tasks that srun starts without a launcher, one tells what is wrong.
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    given = arguments(argv)
    if HELP & set(given):
        if rank == 0:
            print(help_page())
        return
    try:
        config = compose_config(without_quiet(given))
    except ValueError as error:
        leave(error, tell=rank == 0)
    run(config, rank, ranks)


def help_page() -> str:
    """What the command does, the experiments there are, and all keys."""
    installed = how_called() == "if-train train"
    called = "if-train train" if installed else "deepspeed train/main.py"
    usage = f"{called} +experiment=NAME [key=value ...]"
    if installed:
        usage += "\non several GPUs: deepspeed --module train.main +experiment=NAME [key=value ...]"
    usage += f"\n{QUIET_LINE}"
    return f"Trains the net that an experiment describes.\n\nusage: {usage}\n\n{training_help()}"


def run(config: Config, rank: int, ranks: int) -> None:
    """Look at everything that can be looked at before the ranks meet, then train."""
    quiet_libraries()
    # Imported here: torch takes seconds, and --help and a mistyped key are answered before.
    from train.faults.compile_cache import prepare_cache
    from train.faults.node_watch import NodeWatch
    from train.faults.preempt import install_signal_handlers

    raise_open_file_limit()
    install_signal_handlers()
    faulthandler.enable()
    # At INFO setuptools, for one, shows how DeepSpeed looks for a library with gcc. Ours alone is of interest.
    logging.basicConfig(format="%(message)s", handlers=[LogLines(sys.stdout)])
    for name in ("train", "data"):
        logging.getLogger(name).setLevel(logging.INFO)
    if config.dry_run:
        if rank == 0:
            dry_run(config, ranks)
        return
    prepare_cache(config)
    watch = NodeWatch()
    try:
        check_launched(os.environ)
        look_at_node(config, tell=os.environ.get("LOCAL_RANK", "0") == "0")
        check_nodes(os.environ, ranks)
        check_open_files(config.data.workers, ranks)
        check_accumulation(config, ranks)
    except ValueError as error:
        leave(error, tell=rank == 0)
    except OSError as error:
        leave(error, tell=True)
    train_together(config, look(config, ranks) if rank == 0 else None, watch)


def look(config: Config, ranks: int) -> "Inputs | None":
    """What the first rank finds on storage that all ranks share, for all of them; None after telling a mistake.

    Of a run whose sizes follow its data, and which begins, it prints what memory and time it will take.
    """
    from train.checkpoint.format import latest_checkpoint
    from train.monitor.event_files import check_tensorboard
    from train.monitor.tracker import check_login

    try:
        inputs = look_at_storage(config)
        check_login(config.wandb.mode)
        check_tensorboard(config.tensorboard)
        if inputs.sizes and not latest_checkpoint(Path(config.run_dir)):
            from train.summary import describe_cost

            print(describe_cost(config, ranks, inputs), flush=True)
        return inputs
    except (ValueError, OSError) as error:
        tell_mistake(error)
        return None


def look_at_storage(config: Config) -> "Inputs":
    """The inputs, and whether the run can go on with them.  Raises: ValueError; OSError."""
    from train.checkpoint.identity import add_missing_digests
    from train.checkpoint.resume import check_resumable
    from train.inputs import find_inputs

    inputs = find_inputs(config)
    add_missing_digests(inputs.datasets)
    check_resumable(config, inputs.identity)
    return inputs


def dry_run(config: Config, ranks: int) -> None:
    """Make every look that a training begins with, print what would run, then each mistake in a line of its own.

    Exits: 2 if there is a mistake.
    """
    from data.device import check_device, uses_gpu
    from train.faults.compiler import check_compiler
    from train.monitor.event_files import check_tensorboard
    from train.monitor.tracker import check_login
    from train.summary import describe

    mistakes: list[str] = []
    inputs: Inputs | None = None

    def find() -> None:
        nonlocal inputs
        inputs = look_at_storage(config)

    for look in (
        lambda: check_launched(os.environ),
        lambda: check_compiler(uses_gpu()) if config.compile else None,
        lambda: check_nodes(os.environ, ranks),
        lambda: check_open_files(config.data.workers, ranks),
        find,
        lambda: check_accumulation(config, ranks),
        lambda: check_login(config.wandb.mode),
        lambda: check_tensorboard(config.tensorboard),
        lambda: print(describe(config, ranks, inputs)),
    ):
        try:
            look()
        except (ValueError, OSError) as error:
            mistakes.append(reason(error))
    try:
        check_device(config.needs_gpu)
    except ValueError as error:
        # No mistake: what will run elsewhere may be looked at on a machine without a GPU.
        print(f"a training would not start on this machine: {error}")
    for mistake in dict.fromkeys(mistakes):
        print(f"error: {mistake}", file=sys.stderr)
    if mistakes:
        sys.exit(MISTAKE)


def train_together(config: Config, found: "Inputs | None", watch: "NodeWatch") -> None:
    """Join the other ranks and train. A mistake that every rank finds is told by the first, another by who finds it.

    found: by the first rank; None there means that it has told a mistake, which ends all ranks.
    """
    if found is None and os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(MISTAKE)
    # Imported here: the engine takes seconds to import, and what the looks before find is told at once.
    import torch.distributed as dist

    from data.loader.cursor import ShardUnreadable
    from data.loader.workers import LoaderDied
    from data.text.sidecar_record import WrongSidecar
    from train.checkpoint.format import CheckpointFailed
    from train.checkpoint.resume import check_same_everywhere
    from train.engine import init_distributed
    from train.faults.checksum import Corrupted
    from train.faults.guard import NotFinite, RollBack, TooManyBad, TooManySpikes
    from train.faults.run_lock import InUse, lock_run_dir
    from train.inputs import share_inputs
    from train.loop import train

    rank = int(os.environ.get("RANK", "0"))
    try:
        rank, ranks, device = init_distributed(config.hang_seconds)
        inputs = share_inputs(config, found)
        if inputs is None:
            sys.exit(MISTAKE)
        check_same_everywhere(config, inputs.datasets, inputs.held_out)
    except ValueError as error:
        leave(error, tell=rank == 0)
    except OSError as error:
        leave(error, tell=True)
    try:
        if rank == 0:
            lock_run_dir(Path(config.run_dir))
        finished = train(config, inputs, rank, ranks, device)
    except RollBack as error:
        end_lines()
        if rank == 0:
            print(error, flush=True)
        start_again()
    except (TooManyBad, NotFinite, TooManySpikes, CheckpointFailed, InUse) as error:
        leave(error, tell=rank == 0)
    except Corrupted as error:
        leave(error, tell=rank == 0, status=CORRUPTED)
    except (OSError, LoaderDied, ShardUnreadable, WrongSidecar) as error:
        leave(error, tell=True)
    except Exception as error:
        end_lines()  # before a traceback, too
        if not (isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_WORDS)):
            raise
        print(f"rank {rank} ends because another rank is gone; see that rank's own error above", file=sys.stderr)
        # At once: to take the process groups apart, of which a part is gone, can take longer than the next start.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)
    dist.barrier()  # the first rank draws the curves
    watch.stop()
    dist.barrier()  # a launcher ends the others as soon as one has left
    dist.destroy_process_group()
    if not finished:
        sys.exit(REQUEUE)


def start_again() -> NoReturn:
    """Replace this process by a new one, given the same: what a launcher's restart does, without the launcher.

    All ranks call it. The process keeps its number, so launcher and siblings see no end.
    """
    import torch.distributed as dist

    from train.faults.preempt import stop_requested

    # Whatever is to be done at the end of a process: the loader workers leave, and so does W&B's own process. It comes
    # before the ranks meet, since the first one keeps the port of the next meeting until it is replaced.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    asked = [False] * dist.get_world_size()
    dist.all_gather_object(asked, stop_requested())
    dist.destroy_process_group()
    # What is sent from now on waits for the handlers of the next process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    if any(asked) or stop_requested():
        sys.exit(REQUEUE)  # the checkpoints leave the batch out already
    os.execve(sys.executable, sys.orig_argv, ENVIRONMENT)


def look_at_node(config: Config, tell: bool) -> None:
    """Look for the GPU, and the compiler that compile=true needs, on every node.

    tell: whether this rank tells what is wrong.
    """
    from data.device import check_device, uses_gpu
    from train.faults.compiler import check_compiler

    try:
        check_device(config.needs_gpu)
        if config.compile:
            check_compiler(uses_gpu())
    except ValueError as error:
        leave(error, tell)


def check_nodes(environment: Mapping[str, str], ranks: int) -> None:
    """Raises: ValueError if Slurm gave several nodes and the launcher, which does not know Slurm, took one of them."""
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES") or 1)
    of_this_node = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE")
    if nodes > 1 and of_this_node and int(of_this_node) == ranks:
        raise ValueError(
            f"the job has {nodes} nodes, and all {ranks} ranks were started on this one: put launch/slurm/bin first on "
            "PATH, or submit launch/slurm/train.sbatch; for this node alone, unset SLURM_JOB_NUM_NODES"
        )


def leave(error: Exception, tell: bool, status: int = MISTAKE) -> NoReturn:
    """End this process for a mistake, with one line if this rank is to tell it."""
    if tell:
        tell_mistake(error)
    sys.exit(status)


def tell_mistake(error: Exception) -> None:
    """Print it in one line."""
    end_lines()
    text = reason(error)
    if "Original Traceback" in text:  # what a loader worker raised comes with the worker's traceback before it
        text = text.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
