"""Ranks that ask one another in each step whether to stop: python -m tests.support.asking_ranks RANK RANKS FOLDER.

As train/loop.py: asked at the start of a step, answered at its end, gradients summed in between. A step's length is
random. The rank writes FOLDER/ready-RANK in its first step, and FOLDER/RANK at its end, JSON: the steps in which it
made a signal out (raised), had asked with it (asked) and stopped. Run by tests/test_consensus.py.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from train.faults.preempt import RankConsensus, install_signal_handlers, stop_requested

STEPS = 100_000


def main(rank: str, ranks: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/group", rank=int(rank), world_size=int(ranks))
    install_signal_handlers()
    consensus, length = RankConsensus(), random.Random(int(rank))
    found = {"raised": 0, "asked": 0, "stopped": 0}
    for step in range(1, STEPS):
        requested = stop_requested()
        if requested and not found["asked"]:
            found["asked"] = step
        answer = consensus.ask(requested, False)
        if step == 1:
            Path(folder, f"ready-{rank}").touch()
        time.sleep(length.uniform(0, 0.02))
        dist.all_reduce(torch.ones(8))
        time.sleep(length.uniform(0, 0.02))
        if stop_requested() and not found["raised"]:
            found["raised"] = step
        stop, other = answer()
        assert not other
        if stop:
            found["stopped"] = step
            break
    Path(folder, rank).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
