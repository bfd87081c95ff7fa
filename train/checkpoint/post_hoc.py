"""An average of the weights of any length, made after the run of the two that it tracked."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import SNAPSHOTS, step_folders, step_of
from train.checkpoint.reader import PostHocAverage
from train.weights.power_average import TRACKED, coefficients, last_update

# The most that may be left of the wanted profile, see coefficients.
MOST_LEFT = 0.03
# Of coefficients; averages with a smaller one are not read.
NEGLIGIBLE = 1e-6


def open_checkpoint(path: str | Path, ema_length: float | None) -> Checkpoint:
    """Checkpoint.open; with a length its moving average is the one of that length up to its step.

    Raises: ValueError, as Checkpoint.open and with_average.
    """
    checkpoint = Checkpoint.open(path)
    return checkpoint if ema_length is None else with_average(checkpoint, ema_length)


def with_average(checkpoint: Checkpoint, length: float) -> Checkpoint:
    """The checkpoint, its moving average that of another length, made of its own and of the run's snapshots before it.

    Raises: ValueError if the run tracked none, a snapshot is damaged, or there are too few for this length.
    """
    if not checkpoint.config.get("ema_snapshot_every"):
        raise ValueError(
            f"ema_length={length:g} cannot be made of '{checkpoint.folder}': its run tracked no power-function "
            "averages (ema_snapshot_every=0); leave ema_length out for the average that it kept"
        )
    folder = checkpoint.folder.resolve().parent.parent / SNAPSHOTS
    before = [one for one in step_folders(folder.parent, SNAPSHOTS) if step_of(one) < checkpoint.step]
    try:
        snapshots = [Checkpoint.read(one) for one in before]
    except ValueError as error:
        raise ValueError(f"{error}: move it away, and the others are taken") from None
    # By their last update: that of a snapshot is the checkpoint's own if no step was made in between.
    found = {last_update(one.manifest["schedule_step"]): one for one in (*snapshots, checkpoint)}
    averages = [(step, name) for step in found for name in TRACKED]

    def solve(wanted: float) -> tuple[np.ndarray, float]:
        steps, lengths = [step for step, _ in averages], [TRACKED[name] for _, name in averages]
        return coefficients(steps, lengths, max(found), wanted)

    factors, left = solve(length)
    if left > MOST_LEFT:
        possible = [one for one in (i / 1000 for i in range(5, 281)) if solve(one)[1] <= MOST_LEFT]
        nearest = min([*possible, *TRACKED.values()], key=lambda one: abs(one - length))
        raise ValueError(
            f"ema_length={length:g} cannot be made of the averages of step {checkpoint.step} and of {len(snapshots)} "
            f"snapshots in '{folder}': the profile that comes nearest is {left:.1%} off, and at most {MOST_LEFT:.0%} "
            f"are right; the nearest length that can be made is {nearest:g}, and more snapshots "
            f"(ema_snapshot_every={checkpoint.config['ema_snapshot_every']}) give more lengths"
        )
    by_average = zip(factors.tolist(), averages, strict=True)
    taken = [(factor, found[step], name) for factor, (step, name) in by_average if abs(factor) > NEGLIGIBLE]
    for _, one, _ in taken:
        if not one.verified and (fault := one.verify()):
            raise ValueError(f"'{one.folder}' is damaged ({fault}): move it away, and the others are taken")
    terms = [(factor, one.reader(), name) for factor, one, name in taken]
    return replace(checkpoint, average=PostHocAverage(length, terms))
