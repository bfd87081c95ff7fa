"""A training that also tracks averages of other lengths, in fp64: tracked_run.py LENGTHS OVERRIDES, as train/main.py.

LENGTHS: as in 0.03,0.15. On one rank; at its end they are in RUN_DIR/tracked.safetensors, by their lengths. Its
snapshots are of fp32, so that the rounding to any other dtype can be tried on them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from safetensors.torch import save_file

import train.checkpoint.writer as writer
import train.loop as loop
from data.cli import arguments
from train.engine import Engine
from train.main import main
from train.weights.power_average import gamma_of


class Tracking(loop.EMA):
    """Every step, by the paper's formula."""

    def update(self, engine: Engine, step: int) -> None:
        super().update(engine, step)
        for length, average in tracked.items():
            beta = (1 - 1 / step) ** (gamma_of(float(length)) + 1)
            tracked[length] = beta * average + (1 - beta) * engine.master.detach().double()


if __name__ == "__main__":
    lengths, *overrides = arguments(None)
    tracked = dict.fromkeys(lengths.split(","), torch.zeros(1, dtype=torch.float64))
    loop.EMA, writer.SNAPSHOT_DTYPE = Tracking, torch.float32
    main(overrides)
    run_dir = next(value.partition("=")[2] for value in overrides if value.startswith("run_dir="))
    save_file({name: value.contiguous() for name, value in tracked.items()}, Path(run_dir) / "tracked.safetensors")
