"""Real trainings for tests: demo scenes, a small net, the deepspeed launcher, ZeRO-1 and AdamW8bit."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from data import demo
from data.embed import Embed, embed
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.support.terminal import take_terminal
from train.monitor.run_log import STARTS, read_lines

STEPS, SAVE_EVERY = 6, 3
# What starts the ranks of a node, behind the Python and its -u.
LAUNCHER = ["-m", "deepspeed.launcher.launch"]
SMALL = f"""
    +experiment=smoke steps={STEPS} global_batch=8 micro_batch=4 save_every={SAVE_EVERY} log_every=1
    optim.lr_peak=1e-3 optim.warmup_steps=2 data.workers=1 sample.every=0 sample.steps=2 sample.prompts=4
    model.image_size=32 model.channel_mult=[1,2] model.attention_resolutions=[16]
""".split()


def make_data(folder: Path) -> Path:
    """96 scenes in four shards, and their embeddings."""
    demo.main([f"out={folder / 'shards'}", "samples=96", "shard_size=24"])
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 16, "float32", "float32"))
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    repo: Path, data: Path, run_dir: Path, *overrides: str, ranks: int = 1, file_size: tuple[int, int] | None = None,
    script: Path | None = None, before: tuple[str, ...] = (), **popen,
) -> subprocess.Popen:  # fmt: skip
    """Start train/main.py from another folder, as a user might, through the launcher when there are several ranks.

    script: another one, which takes the arguments `before` in front of those.
    """
    main = [str(script or repo / "train" / "main.py"), *before]
    launcher = Path(sys.executable).with_name("deepspeed")
    program = [sys.executable, *main]
    if ranks > 1:
        program = [
            sys.executable,
            str(launcher),
            "-q",
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(free_port()),
            *main,
        ]
    given = {o.split("=")[0] for o in overrides}
    program += [o for o in SMALL if o.split("=")[0] not in given]
    command = [*program, f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}"]
    command = [o for o in command if o.split("=")[0] not in given] + list(overrides)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}",
        "NETRC": os.devnull,
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)

    def limit() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        take_terminal()
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, file_size)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    return subprocess.Popen(command, cwd=run_dir.parent, env=environment, text=True, preexec_fn=limit, **pipes)


def rank_processes(launched: subprocess.Popen) -> list[psutil.Process]:
    """The training processes that deepspeed's launcher has started so far, the first rank first."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launched.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                launcher = process.parent()
                # What was forked and is not a rank yet has the launcher's environment.
                if launcher and launcher.cmdline()[2:4] == LAUNCHER and "RANK" in (given := process.environ()):
                    found[int(given["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def run_ranks(repo: Path, ranks: int, *arguments: str, timeout: int = 500) -> str:
    """Run arguments of Python as ranks of one group, without a launcher; what the first one prints.

    Raises: AssertionError with the end of a rank's stderr if one fails.
    """
    common = os.environ | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=repo, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=timeout) for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return said[0][0]


def launch(*args, timeout: float = 420, **kwargs) -> subprocess.CompletedProcess:
    """start(), and wait for the end."""
    process = start(*args, **kwargs)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def starts_of(run_dir: Path) -> list[dict]:
    """The whole lines of starts.jsonl; a start writes its own once its metrics hold no line of a step that it makes."""
    return read_lines(run_dir / STARTS)[0]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
