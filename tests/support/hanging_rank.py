"""A rank of a node where another one dies, for DeepSpeed's launcher: hanging_rank.py MODE [watch].

The last rank ends with an error. The others never end by themselves: they ignore SIGTERM in Python, as a rank in a
collective does. MODE lock: all but the first also hold the interpreter's lock in native code.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from train.faults.node_watch import NodeWatch


def main(mode: str, *watch: str) -> None:
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    signal.signal(signal.SIGTERM, lambda *_: None)
    if watch:
        NodeWatch()
    time.sleep(2)
    if rank == last:
        raise RuntimeError("this rank's own error")
    if mode == "lock" and rank:
        forever = ctypes.PyDLL(None).pause  # PyDLL keeps the lock, CDLL would release it
        while True:
            forever()
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
