"""Where a run comes from: the configuration, command line, code and machine of each start."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from data.cli import arguments
from if_train import project_version
from train.config import CODE, Config

PACKAGES = ("torch", "deepspeed", "bitsandbytes", "diffusers", "transformers", "numpy", "pillow", "webdataset")
# Environment variables that decide how a job runs; none of them holds a secret.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HOSTNAME")
PREFIXES = ("NCCL_", "SLURM_JOB_", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART", "DS_", "PYTORCH_", "TORCH_NCCL_")


def describe_start(config: Config, step: int, selections: Sequence[dict | None] = ()) -> dict:
    """A start of a run in plain values for JSON.

    step: the step that it resumes from.  selections: as train.checkpoint.identity.DataIdentity has them.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "launch": [Path(sys.executable).name, sys.argv[0], *arguments(None)],
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "version": project_version(),
        "git": git_revision(),
        "device": gpu or platform.processor() or platform.machine(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name in VARIABLES or name.startswith(PREFIXES)
        },
        "config": asdict(config),
        "selections": [*selections],
    }


def git_revision() -> str:
    """The revision of this checkout, with -dirty appended if tracked files were changed; '' if it is none.

    An installed package may lie in somebody else's repository, below its .venv: that one's revision is not ours.
    """
    if not (CODE / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
