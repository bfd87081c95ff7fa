"""Commands of this repository, run one after another by the measurements that train."""

import os
import subprocess
import sys
from dataclasses import fields


def run(*command: str, **environment: str) -> None:
    """`python COMMAND`, one rank, on the CPU.  Raises: SystemExit with the end of what it said if it fails."""
    everything = os.environ | {"DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run([sys.executable, *command], env=everything, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")


def own_and_rest(schema: type, argv: list[str]) -> tuple[list[str], list[str]]:
    """The key=value arguments that a dataclass has, and the others, which go to another command."""
    own = {field.name for field in fields(schema)}
    mine = [arg for arg in argv if arg.partition("=")[0] in own]
    return mine, [arg for arg in argv if arg not in mine]
