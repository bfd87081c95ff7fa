"""One part in a process of its own: python -m tests.gpu_check.run_part PART DEVICE SIZE SHAPES SECONDS.

Writes each row as a line of JSON to the standard output, as soon as there is one. What libraries print goes to the
standard error.
"""

import json
import os
import sys
from dataclasses import asdict

from tests.gpu_check.check import Check, run_part


def main(name: str, device: str, size: str, shapes: str, seconds: str) -> None:
    with os.fdopen(os.dup(1), "w") as rows:
        os.dup2(2, 1)
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # else deepspeed takes a GPU where there is one
        elif name in ("resume", "fewbit_recompute"):
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch's deterministic algorithms ask for it
        check = Check(device, size == "tiny", tuple(shapes.split(",")), float(seconds))
        for row in run_part(name, check):
            print(json.dumps(asdict(row)), file=rows, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
