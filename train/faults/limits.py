"""How long what may take before it is taken for a hang. All limits follow from `hang_seconds`, in this order:

| what may take                                           | hang_seconds x | at 570  | what ends the run then         |
|---------------------------------------------------------|---------------:|--------:|--------------------------------|
| the loader, for a batch                                 |           0.95 | 9 min   | the rank names shards and step |
| a micro batch, or a denoising step of the sample grid   |              1 | 9.5 min | each rank prints its stacks    |
| the first micro batch, in which the net may be compiled |              3 | 29 min  | the same                       |
| the copy of a checkpoint, and the wait for one          |              6 | 57 min  | the same                       |
| a collective, in which a rank waits for the others      |              8 | 76 min  | gloo or NCCL, less clearly     |

A forward pass of a validation may take as long as a micro batch.
The sample grid has no limit of its own: each of its steps is told to all ranks (train/faults/first_rank.py).
A rank that has ended is no hang: train/faults/node_watch.py.
"""

from datetime import timedelta

HANG_SECONDS = 570
LOADER, FIRST, SAVE, COLLECTIVE = 0.95, 3, 6, 8


def collective_limit(hang_seconds: float) -> timedelta:
    """How long a rank waits for the others in any process group, DeepSpeed's own ones included."""
    return timedelta(seconds=COLLECTIVE * hang_seconds)
