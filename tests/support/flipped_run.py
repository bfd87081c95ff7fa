"""A training in which the second rank flips a bit of its masters: flipped_run.py STEP OVERRIDES, as train/main.py.

STEP: of this start, the first is 1.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import os  # noqa: E402 - the path comes first

from data.cli import arguments  # noqa: E402
from tests.support.flipped_bits import Trial, flipping  # noqa: E402
from train.main import main  # noqa: E402

if __name__ == "__main__":
    step, *overrides = arguments(None)
    with flipping(Trial("masters", step=int(step)), int(os.environ["RANK"])):
        main(overrides)
