"""A training whose loaders give checkerboards for one global batch: spoiled_run.py BATCH OVERRIDES, as train/main.py.

BATCH: its index in the order of the run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from data.cli import arguments
from tests.support.bad_pictures import spoil
from train.main import main

if __name__ == "__main__":
    batch, *overrides = arguments(None)
    spoil(int(batch))
    main(overrides)
