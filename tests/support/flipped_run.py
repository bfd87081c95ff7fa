"""A training in which the second rank flips a bit of its masters: flipped_run.py STEP OVERRIDES, as train/main.py.

STEP: of this start, the first is 1.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import os

from data.cli import arguments
from tests.support.flipped_bits import Trial, flipping
from train.main import main

if __name__ == "__main__":
    step, *overrides = arguments(None)
    with flipping(Trial("masters", step=int(step)), int(os.environ["RANK"])):
        main(overrides)
