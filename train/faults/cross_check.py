"""Finds devices that make errors without saying so: the ranks compare what must be the same on all of them."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from data.checks import count
from data.loader.batch import Batch
from model.diffusion import Diffusion
from model.losses import training_losses
from train.config import Config
from train.ema import EMA
from train.engine import Engine
from train.faults.checksum import Corrupted, checksum, gradient_checksum
from train.faults.majority import far_off, outvoted, wrong_parts
from train.faults.preempt import RankConsensus
from train.faults.quarantine import node_name, record_node_fault
from train.inputs import Inputs
from train.noise import DeviceBatch, DeviceBatches

# Where equal inputs need not give equal bits, a loss or gradient norm may be this part of the ranks' median off it.
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Computed:
    """What a rank makes of a batch.

    bits: checksum of the losses of its samples and of the gradient.  norm: of the gradient.
    """

    bits: int
    loss: float
    norm: float


class CrossCheck:
    """Compares the ranks every config.check_every steps and before each checkpoint.

    State that only one rank has, masters, moments and average, is summed at the end of a step, and again before the
    next one changes it. Copies of the weights are compared among the ranks, and with the masters that they were made
    of. Every check_every steps all ranks compute loss and gradient of one micro batch, of each rank in turn.
    At other steps the host does not wait for the device.
    """

    def __init__(
        self, config: Config, engine: Engine, ema: EMA, diffusion: Diffusion, inputs: Inputs, batches: DeviceBatches,
        consensus: RankConsensus,
    ) -> None:  # fmt: skip
        self._every, self._run_dir = config.check_every, Path(config.run_dir)
        self._engine, self._ema, self._diffusion, self._inputs = engine, ema, diffusion, inputs
        self._batches, self._consensus = batches, consensus
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # A GPU's kernels need not be deterministic, and a process that compiles may choose others, so the first
        # comparison tells whether bits are equal.
        self._exact, self._sure = True, not config.compile and engine.master.device.type == "cpu"
        self._sums: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}
        if self._every:
            self._seal(with_weights=False)
            engine.before_update(self._verify)

    def check(self, step: int, batch: DeviceBatch, before_save: bool) -> None:
        """Compare the ranks, if it is time to; a collective call.

        batch: any one of this rank in this step.
        Raises: Corrupted.
        """
        if not self._every:
            return
        due = step % self._every == 0
        if self._engine.stepped:
            self._seal(with_weights=(step + 1) % self._every == 0)
        else:
            self._verify()
        if due or before_save:
            faults = self._memory_faults()
            if due and not faults:  # wrong weights compute wrongly
                for rank, text in self._computing_faults(batch, source=step // self._every % self._ranks):
                    faults[rank].append(text)
            if faults:
                self._end(step, faults)

    def _state(self, with_weights: bool) -> dict[str, list[Tensor]]:
        moments = [moment for moment in self._engine.moments.values() if moment.ndim]
        state = {"masters": [self._engine.master], "moments": moments, "average": [*self._ema.averages.values()]}
        return state | ({"weights": self._weights()} if with_weights else {})

    def _weights(self) -> list[Tensor]:
        """All weights, those that are not trained included."""
        return [self._engine.weights, *(p for p in self._engine.model.parameters() if not p.requires_grad)]

    def _seal(self, with_weights: bool) -> None:
        """Keep the sums of what nothing changes before the optimizer's next update."""
        self._sums = {name: checksum(tensors) for name, tensors in self._state(with_weights).items() if tensors}

    def _verify(self) -> None:
        """Note what has changed since; the host learns it at the next check."""
        state = self._state("weights" in self._sums)
        for name, before in self._sums.items():
            changed = checksum(state[name]) != before
            self._changed[name] = self._changed[name] | changed if name in self._changed else changed

    def _memory_faults(self) -> defaultdict[int, list[str]]:
        """What is wrong with the state of each rank, by rank."""
        faults: defaultdict[int, list[str]] = defaultdict(list)
        changed = [name for name, value in self._changed.items() if value]
        masters = int(checksum([self._engine.master.to(self._engine.weights.dtype)]))
        rounded = masters == int(checksum([self._engine.weights[self._rank]]))
        found = self._consensus.gather((changed, rounded, int(checksum(self._weights()))))
        for rank, (names, _, _) in enumerate(found):
            faults[rank] += [f"its {name} changed while nothing wrote to them" for name in names]
        if len({weights for _, _, weights in found}) > 1 or not all(rounded for _, rounded, _ in found):
            frozen = int(checksum(self._weights()[1:]))
            of_parts = self._consensus.gather(
                ([int(checksum([part])) for part in self._engine.weights], masters, frozen)
            )
            wrong_copies, wrong_masters = wrong_parts([parts for parts, _, _ in of_parts], [m for _, m, _ in of_parts])
            for rank in sorted({*wrong_copies, *outvoted([frozen for _, _, frozen in of_parts])}):
                faults[rank].append("its copy of the weights is another than that of the others")
            for rank in wrong_masters:
                faults[rank].append("its masters do not round to the weights that were made of them")
        return defaultdict(list, {rank: texts for rank, texts in faults.items() if texts})

    def _computing_faults(self, batch: DeviceBatch, source: int) -> list[tuple[int, str]]:
        """What is wrong with the batch of each rank, and with what it makes of that of the rank `source`."""
        assert batch.loaded is not None
        sent = self._batches.send(batch.loaded)
        intact = int(checksum(sent.tensors)) == int(checksum(batch.tensors))
        if self._ranks == 1:
            return [] if intact else [(0, "its batch changed on the device")]
        loaded = self._consensus.share(batch.loaded, source)
        found = self._consensus.gather((intact, self._compute(loaded)))
        faults = [(rank, "its batch changed on the device") for rank, (intact, _) in enumerate(found) if not intact]
        computed = [value for _, value in found]
        if self._exact and len({value.bits for value in computed}) > 1:
            again = self._consensus.gather(self._compute(loaded))
            unsteady = [rank for rank in range(self._ranks) if again[rank].bits != computed[rank].bits]
            self._exact = self._sure and len(unsteady) <= max(1, self._ranks // 10)
            if self._exact:
                wrong = outvoted([value.bits for value in computed])
                # Of two ranks none is outvoted, but one may contradict itself.
                wrong = unsteady if unsteady and len(wrong) == self._ranks else wrong
                return faults + [(rank, _computed_otherwise(rank in unsteady)) for rank in wrong]
            if self._rank == 0:
                print(
                    f"equal inputs do not give equal bits here ({len(unsteady)} of {count(self._ranks, 'rank')} do not "
                    f"repeat their own): losses and gradients are compared within {TOLERANCE:.0%}",
                    flush=True,
                )
        self._sure = True
        if not self._exact:
            wrong = sorted(
                {
                    *far_off([value.loss for value in computed], TOLERANCE),
                    *far_off([value.norm for value in computed], TOLERANCE),
                }
            )
            faults += [(rank, f"its loss or gradient is more than {TOLERANCE:.0%} off") for rank in wrong]
        return faults

    def _compute(self, loaded: Batch) -> Computed:
        """Loss and gradient of a batch, beside those of the training, which stay as they are."""
        batch, net = self._batches.send(loaded), self._engine.model
        x_t = self._diffusion.q_sample(batch.x_start, batch.t, batch.noise)
        model_output = net(x_t, batch.t, self._inputs.text_emb(batch.text_emb), *batch.low_res)
        losses = training_losses(self._diffusion, model_output, batch.x_start, x_t, batch.t, batch.noise)["loss"]
        loss = (losses * batch.weight).mean()
        gradient, norm = gradient_checksum(loss, [p for p in net.parameters() if p.requires_grad])
        return Computed(int(checksum([losses, gradient])), float(loss.detach()), float(norm))

    def _end(self, step: int, faults: dict[int, list[str]]) -> None:
        """Raises: Corrupted, on all ranks, with the rank, device and node of each fault."""
        places = self._consensus.gather((node_name(), os.environ.get("LOCAL_RANK", "0")))
        told = {
            rank: f"rank {rank} (device {places[rank][1]} of node {places[rank][0]}): {', '.join(faults[rank])}"
            for rank in sorted(faults)
        }
        # Two that contradict each other do not tell which is wrong.
        sure = len(faults) == 1 or 2 * len(faults) < self._ranks
        nodes = sorted({places[rank][0] for rank in faults})
        if sure and self._rank == 0:
            for node in nodes:
                first = next(text for rank, text in told.items() if places[rank][0] == node)
                record_node_fault(self._run_dir, node, "corruption", f"step {step}: {first}")
        self._consensus.gather(None)  # no rank leaves before, or the first one would be ended as it writes
        remedy = f"leave out {', '.join(nodes)}" if sure else "they contradict each other: look at both"
        raise Corrupted(
            f"step {step}: {'; '.join(told.values())}. Nothing is saved of it; {remedy}, and run the same command: it "
            "goes on from the latest checkpoint, before which all ranks agreed"
        )


def _computed_otherwise(unsteady: bool) -> str:
    repeated = "and another one when it is asked again" if unsteady else "and the same when it is asked again"
    return f"it computes another loss or gradient than the others of the same batch, {repeated}"
