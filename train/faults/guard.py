"""Ends a run that would train on nonsense: too many unreadable samples, too many steps without a finite loss.

Tells steps whose error or gradient norm leaps, and by choice sends the run back before them.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from data.loader.stream import MicroBatches
from train.checkpoint.format import complete_checkpoints, leave_out
from train.checkpoint.writer import CheckpointWriter
from train.config import Config
from train.engine import Engine
from train.faults.first_rank import of_first_rank
from train.faults.preempt import RankConsensus
from train.faults.quarantine import Quarantine
from train.faults.spikes import JudgedStep, SpikeMemory, Spikes

logger = logging.getLogger(__name__)

# An error names at most this many samples.
MAX_NAMED = 8
# The share of bad samples is judged over at least this many, so that a few bad ones do not end a small run.
MIN_SAMPLES = 500


class TooManyBad(RuntimeError):
    """More samples are unreadable than data.max_bad_share allows; all ranks raise it together."""


class NotFinite(RuntimeError):
    """config.max_skipped steps in a row had no finite loss and gradient; all ranks raise it together."""


class TooManySpikes(RuntimeError):
    """The run went back max_rollbacks times and meets another spike; all ranks raise it together."""


class RollBack(RuntimeError):
    """The run is to start again from its latest checkpoint, which leaves a batch out now; all ranks raise it."""


class Guard:
    """Counts and lists unreadable samples and skipped steps, and ends the run when there are too many.

    memory: of the run's spikes, as its checkpoint has it.
    The engine skips a step when the norm of its gradient is not finite. All ranks share that norm, so all skip it.
    """

    def __init__(
        self, config: Config, rank: int, stream: MicroBatches, consensus: RankConsensus, writer: CheckpointWriter,
        memory: SpikeMemory,
    ) -> None:  # fmt: skip
        self._config, self._rank, self._writer = config, rank, writer
        self._spikes = Spikes(config.spike_factor, memory, consensus)
        self._max_skipped, self._max_bad_share = config.max_skipped, config.data.max_bad_share
        self._stream, self._consensus = stream, consensus
        self._quarantine = Quarantine(Path(config.run_dir), rank)
        self._next_micro_batch = stream.first
        self._losses: list[tuple[int, dict[str, Tensor]]] = []
        self._skipped_in_a_row = self._skipped = self._spiked = 0
        self._samples = self._bad = 0.0

    def record(self, step: int, bad: list[tuple[str, str]], losses: dict[str, Tensor]) -> None:
        """List the bad samples of the next micro batch, and keep its losses [N] without reading their values.

        losses: as training_losses gives them.
        """
        self._quarantine.add(step, bad)
        self._losses.append((self._next_micro_batch, {name: losses[name].detach() for name in ("loss", "mse")}))
        self._next_micro_batch += 1

    def check_step(self, step: int, engine: Engine) -> None:
        """Count a step that was made or skipped; list the samples of a skipped one whose loss is not finite.

        A collective call. The step two before this one is judged for a spike.
        Raises: NotFinite; RollBack, TooManySpikes.
        """
        losses, self._losses = self._losses, []
        if engine.stepped:
            self._skipped_in_a_row = 0
            self._spikes.add(step, [(number, of_samples["mse"]) for number, of_samples in losses], engine.grad_norm())
            self._judge()
            return
        self._skipped_in_a_row, self._skipped = self._skipped_in_a_row + 1, self._skipped + 1
        culprits = [
            (self._stream.sample_name(number, i), f"loss {of_samples['loss'][i].item()}")
            for number, of_samples in losses
            for i in (~torch.isfinite(of_samples["loss"])).nonzero().flatten().tolist()
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

    def pop_counts(self) -> dict[str, float]:
        """Steps skipped, and spikes told, since the last call."""
        counts: dict[str, float] = {"skipped_steps": self._skipped, "spikes": self._spiked}
        self._skipped = self._spiked = 0
        return counts

    def remembered(self) -> SpikeMemory:
        """The memory of the spikes, all steps judged: no checkpoint holds a step that the run would go back behind.

        A collective call.  Raises: RollBack, TooManySpikes.
        """
        self._judge(all_steps=True)
        return self._spikes.memory

    def _judge(self, all_steps: bool = False) -> None:
        while found := self._spikes.judge(all_steps):
            self._spiked += 1
            self._on_spike(*found)

    def _on_spike(self, judged: JudgedStep, what: str) -> None:
        """Tell a spike with the samples of its batch that have the highest mse, then go back if that is chosen."""
        number, errors = judged.errors[0][0], torch.cat([values for _, values in judged.errors]).tolist()
        own = sorted(((error, self._rank, i) for i, error in enumerate(errors)), reverse=True)[:MAX_NAMED]
        highest = sorted((entry for found in self._consensus.gather(own) for entry in found), reverse=True)[:MAX_NAMED]
        # To name a sample its shard is read, so each rank names only what is told.
        named = [(error, self._name(number, i)) for error, rank, i in highest if rank == self._rank]
        self._quarantine.add(judged.step, [(name, f"in a spike, mse {error:.4g}") for error, name in named])
        of_all = sorted((pair for pairs in self._consensus.gather(named) for pair in pairs), reverse=True)
        batch = self._stream.batch_of(number)
        worst = ", ".join(f"{name} ({error:.4g})" for error, name in of_all)
        text = f"step {judged.step}, batch {batch}: {what}; highest mse: {worst}"
        if self._rank == 0:
            logger.warning("SPIKE %s", text)
        if self._config.on_spike == "rollback":
            self._roll_back(batch, text)

    def _name(self, number: int, i: int) -> str:
        size = self._stream.micro_batch
        try:
            return self._stream.sample_name(number + i // size, i % size)
        except OSError as error:
            return f"one whose name cannot be read ({error})"

    def _roll_back(self, batch: int, what: str) -> None:
        """Raises: RollBack; TooManySpikes."""
        left_out = self._spikes.memory.left_out
        if len(left_out) >= self._config.max_rollbacks:
            raise TooManySpikes(
                f"{what}; the run left out {len(left_out)} batches for spikes before, max_rollbacks="
                f"{self._config.max_rollbacks}: lower optim.lr_peak or optim.grad_clip, look at the samples, or raise "
                "the limit or spike_factor"
            )
        self._writer.finish()

        def prepare() -> bool:
            folders = complete_checkpoints(Path(self._config.run_dir))
            for folder in folders:
                leave_out(folder, {"batch": batch, "what": what})
            return bool(folders)

        if of_first_rank(prepare):
            raise RollBack(f"back to the latest checkpoint, and without batch {batch} from there on")
        if self._rank == 0:
            logger.warning("there is no checkpoint to go back to yet, so the run goes on")
