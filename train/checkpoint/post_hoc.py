"""An average of the weights of any length, made after the run of the two that it tracked."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import SNAPSHOTS, step_folders, step_of
from train.checkpoint.reader import PostHocAverage
from train.weights.power_average import TRACKED, coefficients, last_update

# The most that an average may be off: what is left of the wanted profile, see coefficients, and the rounding.
MOST_LEFT = 0.03
# The rounding of a snapshot to fp16, relative to its size.
ROUNDING = 2**-11 / 3**0.5
# Of coefficients; averages with a smaller one are not read.
NEGLIGIBLE = 1e-6


def open_checkpoint(path: str | Path, ema_length: float | None) -> Checkpoint:
    """Checkpoint.open; with a length its moving average is the one of that length up to its step.

    Raises: ValueError, as Checkpoint.open and with_averages.
    """
    checkpoint = Checkpoint.open(path)
    return checkpoint if ema_length is None else with_averages(checkpoint, [ema_length])[0]


def with_averages(checkpoint: Checkpoint, lengths: Sequence[float]) -> list[Checkpoint]:
    """The checkpoint for each length, its moving average that one, made of its own and of the run's snapshots before.

    All that is read for them is verified, once.
    Raises: ValueError if the run tracked none, a file is damaged, or there are too few snapshots for a length.
    """
    if not checkpoint.config.get("ema_snapshot_every"):
        raise ValueError(
            f"ema_length={lengths[0]:g} cannot be made of '{checkpoint.folder}': its run tracked no power-function "
            "averages (ema_snapshot_every=0); leave ema_length out for the average that it kept"
        )
    # Without following links: checkpoints may lie on another disk than the snapshots.
    folder = checkpoint.folder.absolute().parent.parent / SNAPSHOTS
    before = [one for one in step_folders(folder.parent, SNAPSHOTS) if step_of(one) < checkpoint.step]
    try:
        snapshots = [Checkpoint.read(one) for one in before]
    except ValueError as error:
        raise ValueError(f"{error}: move it away, and the others are taken") from None
    # By their last update: that of a snapshot is the checkpoint's own if no step was made in between.
    found = {last_update(one.manifest["schedule_step"]): one for one in (*snapshots, checkpoint)}
    averages = [(step, name) for step in found for name in TRACKED]
    rounded = [found[step] is not checkpoint for step, _ in averages]

    def solve(wanted: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients for each length, and how far off their sum is."""
        steps, tracked = [step for step, _ in averages], [TRACKED[name] for _, name in averages]
        factors, left = coefficients(steps, tracked, max(found), wanted)
        return factors, left + ROUNDING * np.linalg.norm(factors[:, rounded], axis=1)

    factors, off = solve(lengths)
    for length, is_off in zip(lengths, off, strict=True):
        if is_off > MOST_LEFT:
            grid = [i / 1000 for i in range(5, 281)]
            possible = [one for one, its in zip(grid, solve(grid)[1], strict=True) if its <= MOST_LEFT]
            nearest = min([*possible, *TRACKED.values()], key=lambda one: abs(one - length))
            raise ValueError(
                f"ema_length={length:g} cannot be made of the averages of step {checkpoint.step} and of "
                f"{len(snapshots)} snapshots in '{folder}': the profile that comes nearest is {is_off:.1%} off, the "
                f"rounding of the snapshots included, and at most {MOST_LEFT:.0%} are right; the nearest length that "
                f"can be made is {nearest:g}, and more snapshots "
                f"(ema_snapshot_every={checkpoint.config['ema_snapshot_every']}) give more lengths"
            )
    made = []
    for length, of_length in zip(lengths, factors.tolist(), strict=True):
        taken = [(factor, *one) for factor, one in zip(of_length, averages, strict=True) if abs(factor) > NEGLIGIBLE]
        terms = [(factor, _intact(found[step], checkpoint).reader(), name) for factor, step, name in taken]
        made.append(replace(checkpoint, average=PostHocAverage(length, terms)))
    return made


def _intact(one: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """The same, a snapshot or the checkpoint itself, once it is verified. Raises: ValueError if it is damaged."""
    if one is checkpoint:
        one.check_intact()
    elif not one.verified and (fault := one.verify()):
        raise ValueError(f"'{one.folder}' is damaged ({fault}): move it away, and the others are taken")
    return one
