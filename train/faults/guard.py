"""What keeps a run from training on nonsense or hanging: bad samples, steps that are not finite, and a watchdog."""

from pathlib import Path

import torch
from torch import Tensor

from data.loader.batch import Batch
from data.loader.stream import MicroBatches
from train.config import Config
from train.faults.preempt import RankConsensus
from train.faults.quarantine import Quarantine

SHOWN = 8
# A share is judged over no fewer samples than this, so that a few bad ones in a small run do not end it.
MIN_SEEN = 500


class TooManyBad(RuntimeError):
    """So many samples could not be read that going on would train on something else; raised by all ranks alike."""


class NotFinite(RuntimeError):
    """So many steps in a row were not finite that the run has left its way; raised by all ranks alike."""


class Guard:
    """Counts and lists samples that could not be read and steps that the engine skipped; too many end the run.

    That a step is skipped all ranks know from the norm of the gradient, which they share (train/engine.py).
    """

    def __init__(self, config: Config, rank: int, stream: MicroBatches, consent: RankConsensus) -> None:
        self._most, self._share = config.max_skipped, config.data.max_bad_share
        self._stream, self._consent = stream, consent
        self._quarantine = Quarantine(Path(config.run_dir), rank)
        self._number = stream.first
        self._losses: list[tuple[int, Tensor]] = []
        self._in_a_row = self._skipped = 0
        self._seen = self._bad = 0.0

    def note(self, step: int, batch: Batch, losses: Tensor) -> None:
        """List the bad samples of the next micro batch, and remember its losses [N] without looking at them."""
        self._quarantine.add(step, batch.bad)
        self._losses.append((self._number, losses.detach()))
        self._number += 1

    def judge(self, step: int, applied: bool) -> None:
        """A step was made, or skipped; a collective call in the latter case.

        Raises: NotFinite.
        """
        losses, self._losses = self._losses, []
        if applied:
            self._in_a_row = 0
            return
        self._in_a_row, self._skipped = self._in_a_row + 1, self._skipped + 1
        culprits = [
            (self._stream.sample_name(number, i), f"loss {values[i].item()}")
            for number, values in losses
            for i in (~torch.isfinite(values)).nonzero().flatten().tolist()
        ]
        self._quarantine.add(step, culprits)
        if self._in_a_row < self._most:
            return
        everywhere = [f"{key} ({what})" for found in self._consent.gather(culprits[:SHOWN]) for key, what in found]
        samples = f"of {', '.join(everywhere[:SHOWN])}" if everywhere else "of no sample, but the gradient of all,"
        raise NotFinite(
            f"step {step}: {self._in_a_row} steps in a row had no finite loss and gradient and were skipped; in the "
            f"last one the loss {samples} was not. The weights are those of step {step - self._in_a_row}. Look at the "
            "samples, listed in RUN_DIR/quarantine; lower optim.lr_peak or optim.grad_clip; or move the latest "
            "checkpoints away, so that the run goes on from an earlier one"
        )

    def judge_share(self, step: int, metrics: dict[str, float], reasons: dict[str, int]) -> None:
        """Take in the samples that all ranks counted since the last call.

        Raises: TooManyBad.
        """
        self._seen, self._bad = self._seen + metrics["samples"], self._bad + metrics["bad_samples"]
        if self._bad > self._share * max(self._seen, MIN_SEEN):
            raise TooManyBad(
                f"step {step}: {self._bad:.0f} of the last {self._seen:.0f} samples could not be read "
                f"(here: {reasons}), more than data.max_bad_share={self._share}: mend the shards, or raise the limit"
            )
        if self._seen >= MIN_SEEN:
            self._seen = self._bad = 0.0

    def read(self) -> int:
        """Steps skipped since the last read."""
        skipped, self._skipped = self._skipped, 0
        return skipped
