"""A training whose loaders give checkerboards for one global batch: spoiled_run.py BATCH OVERRIDES, as train/main.py.

BATCH: its index in the order of the run.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from data.cli import arguments  # noqa: E402 - the path comes first
from tests.support.bad_pictures import spoil  # noqa: E402
from train.main import main  # noqa: E402

if __name__ == "__main__":
    batch, *overrides = arguments(None)
    spoil(int(batch))
    main(overrides)
