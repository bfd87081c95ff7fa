"""Commands of this repository, run one after another by the measurements that train."""

import os
import subprocess
import sys


def run(*command: str, **environment: str) -> None:
    """`python COMMAND`, one rank, on the CPU.  Raises: SystemExit with the end of what it said if it fails."""
    everything = os.environ | {"DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run([sys.executable, *command], env=everything, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")
