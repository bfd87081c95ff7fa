"""Ends a run that would train on nonsense: too many unreadable samples, too many steps without a finite loss."""

from pathlib import Path

import torch
from torch import Tensor

from data.loader.stream import MicroBatches
from train.config import Config
from train.faults.preempt import RankConsensus
from train.faults.quarantine import Quarantine

# An error names at most this many samples.
MAX_NAMED = 8
# The share of bad samples is judged over at least this many, so that a few bad ones do not end a small run.
MIN_SAMPLES = 500


class TooManyBad(RuntimeError):
    """More samples are unreadable than data.max_bad_share allows; all ranks raise it together."""


class NotFinite(RuntimeError):
    """config.max_skipped steps in a row had no finite loss and gradient; all ranks raise it together."""


class Guard:
    """Counts and lists unreadable samples and skipped steps, and ends the run when there are too many.

    The engine skips a step when the norm of its gradient is not finite. All ranks share that norm, so all skip it.
    """

    def __init__(self, config: Config, rank: int, stream: MicroBatches, consensus: RankConsensus) -> None:
        self._max_skipped, self._max_bad_share = config.max_skipped, config.data.max_bad_share
        self._stream, self._consensus = stream, consensus
        self._quarantine = Quarantine(Path(config.run_dir), rank)
        self._next_micro_batch = stream.first
        self._losses: list[tuple[int, Tensor]] = []
        self._skipped_in_a_row = self._skipped = 0
        self._samples = self._bad = 0.0

    def record(self, step: int, bad: list[tuple[str, str]], losses: Tensor) -> None:
        """List the bad samples of the next micro batch, and keep its losses [N] without reading their values."""
        self._quarantine.add(step, bad)
        self._losses.append((self._next_micro_batch, losses.detach()))
        self._next_micro_batch += 1

    def check_step(self, step: int, stepped: bool) -> None:
        """Count a step that was made or skipped; list the samples of a skipped one whose loss is not finite.

        A collective call when the step was skipped, since all ranks skip it.
        Raises: NotFinite.
        """
        losses, self._losses = self._losses, []
        if stepped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row, self._skipped = self._skipped_in_a_row + 1, self._skipped + 1
        culprits = [
            (self._stream.sample_name(number, i), f"loss {values[i].item()}")
            for number, values in losses
            for i in (~torch.isfinite(values)).nonzero().flatten().tolist()
        ]
        self._quarantine.add(step, culprits)
        if self._skipped_in_a_row < self._max_skipped:
            return
        all_culprits = [
            f"{key} ({loss})" for found in self._consensus.gather(culprits[:MAX_NAMED]) for key, loss in found
        ]
        cause = (
            f"the loss was not finite for {', '.join(all_culprits[:MAX_NAMED])}"
            if all_culprits
            else "every loss was finite, but the gradient was not"
        )
        raise NotFinite(
            f"step {step}: {self._skipped_in_a_row} steps in a row had no finite loss and gradient and were skipped. "
            f"In the last one {cause}. The weights are those of step {step - self._skipped_in_a_row}. Look at the "
            "samples listed in RUN_DIR/quarantine; lower optim.lr_peak or optim.grad_clip; or move the latest "
            "checkpoints away, and the run resumes from an earlier one"
        )

    def check_bad_share(self, step: int, values: dict[str, float], bad_counts: dict[str, int]) -> None:
        """Judge the share of bad samples over the logged values, which are the same on all ranks.

        bad_counts: the bad samples of this rank by reason, for the error.
        Raises: TooManyBad.
        """
        self._samples, self._bad = self._samples + values["samples"], self._bad + values["bad_samples"]
        if self._bad > self._max_bad_share * max(self._samples, MIN_SAMPLES):
            raise TooManyBad(
                f"step {step}: {self._bad:.0f} of the last {self._samples:.0f} samples could not be read (on this "
                f"rank: {bad_counts}), more than data.max_bad_share={self._max_bad_share}: repair the shards, or raise "
                "the limit"
            )
        if self._samples >= MIN_SAMPLES:
            self._samples = self._bad = 0.0

    def pop_skipped(self) -> int:
        """Steps skipped since the last call."""
        skipped, self._skipped = self._skipped, 0
        return skipped
