"""Trainings in which one rank has a bit flipped: `python -m tests.support.flipped_bits DATA OUT TRIALS`, as a rank.

TRIALS is JSON, a list of Trial's fields; each is a training by train/loop.py in this process, one after another. What
came of them goes to OUT, JSON, a Result's fields for each. Run by tests/test_cross_check.py and
tests/benchmarks/silent_corruption.py.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.chaos import TINY
from tests.support.counted_waits import replace
from tests.support.trainings import SMALL
from train import loop
from train.checkpoint import new_folder
from train.checkpoint.format import CheckpointFailed, complete_checkpoints, step_of
from train.compose import compose_config
from train.engine import Engine, init_distributed
from train.faults.checksum import checksum
from train.faults.cross_check import Corrupted, CrossCheck
from train.faults.quarantine import read_node_faults
from train.inputs import find_inputs
from train.noise import DeviceBatches

SAVE_FILE = new_folder.save_file
CHECK_EVERY, SAVE_EVERY, STEPS = 4, 6, 10
# Bits by the bytes of a number: of fp32, of bf16, and of 8-bit codes.
BITS = {
    "exponent, highest": {4: 30, 2: 14, 1: 7},
    "mantissa, highest": {4: 22, 2: 6, 1: 3},
    "mantissa, lowest": {4: 0, 2: 0, 1: 0},
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(slots=True)
class Trial:
    """One training.

    what: one of ways(), none, or noise, which is no bit but an activation that is never the same.  bit: of BITS.
    step: the first in which it is flipped.  rank: on which it is; -1 for all.
    """

    what: str
    bit: str = "mantissa, lowest"
    step: int = 2
    rank: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw8bit"
    image_size: int = 8


@dataclass(slots=True)
class Result:
    """What came of it.

    found: the step in which the training was ended, 0 if it was not.  said: the error.  saved: the checkpoints' steps.
    masters: checksum of those of all ranks at the end.  nodes: what RUN_DIR/nodes.json says.
    steps, checked: of each step, seconds of the first rank's processor, and of its checks.
    """

    found: int = 0
    said: str = ""
    saved: list[int] | None = None
    masters: int = 0
    nodes: dict = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    checked: list[float] = field(default_factory=list)


class Moment:
    """Where a training is: its step, and the backwards that were made in it."""

    def __init__(self) -> None:
        self.step, self.backwards = 1, 0
        self.checks: CrossCheck | None = None
        # Of the processor: of a step's checks, and of a whole step; the ends of what is measured.
        self.checked, self.steps = [0.0], []
        self.began, self.step_began = 0.0, time.process_time()


def flip(tensor: Tensor, bit: str) -> None:
    """Flip a bit of the element in the middle."""
    bits, size = tensor.detach().view(-1).view(INTEGERS[tensor.element_size()]), tensor.element_size()
    bits[len(bits) // 2] ^= 1 << BITS[bit][size]


def moments(engine: Engine) -> Tensor:
    """The first moment."""
    return next(value for value in engine.moments.values() if value.ndim)


def gradient(engine: Engine) -> Tensor:
    """A part of the gradient that this rank has added up."""
    return next(p.grad for p in engine.model.parameters() if p.grad is not None)


def around(owner: type, name: str, first: Callable | None = None, then: Callable | None = None) -> tuple:
    """Call first(self, ...) before each call of a method, and then(self, result) after it; what sets it back."""
    real = getattr(owner, name)

    def both(self, *args, **kwargs):
        if first:
            first(self, *args)
        result = real(self, *args, **kwargs)
        if then:
            then(self, result)
        return result

    return replace(owner, name, both)


def ways(trial: Trial, now: Moment) -> list[tuple]:
    """Have the bit flipped when it is time; what sets the methods back."""

    def once(of: Callable[[Engine], Tensor]) -> Callable:
        return lambda engine, *_: flip(of(engine), trial.bit) if (now.step, now.backwards) == (trial.step, 0) else None

    def always(tensor: Tensor) -> None:
        if now.step >= trial.step:
            flip(tensor, trial.bit)

    def at_the_end(checks: CrossCheck, *_: object) -> None:
        if now.step == trial.step:
            flip(checks._ema.average, trial.bit)

    in_memory = {"weights": lambda engine: engine.weights, "masters": lambda engine: engine.master, "moments": moments}
    if trial.what in in_memory:
        return [around(Engine, "backward", first=once(in_memory[trial.what]))]

    own = torch.Generator().manual_seed(os.getpid())  # torch's own has one seed on all ranks

    def noise(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * (1 + 0.01 * torch.randn(output.shape, generator=own).to(output))

    return {
        "none": list,
        "noise": lambda: [
            around(
                CrossCheck,
                "__init__",
                then=lambda checks, _: checks._engine.model.middle_block[0].register_forward_hook(noise),
            )
        ],
        "checkpoint in host memory": lambda: [replace(new_folder, "save_file", save_flipped(now, trial))],
        "average": lambda: [around(CrossCheck, "check", then=at_the_end)],
        "gradient, once": lambda: [around(Engine, "backward", then=once(gradient))],
        "pixels on the device, always": lambda: [
            around(DeviceBatches, "__next__", then=lambda _, batch: always(batch.x_start))
        ],
        "pixels on the host, always": lambda: [
            around(DeviceBatches, "__init__", then=lambda batches, _: flip_loaded(batches, always))
        ],
        "activation, always": lambda: [
            around(
                CrossCheck,
                "__init__",
                then=lambda checks, _: checks._engine.model.middle_block[0].register_forward_hook(
                    lambda module, args, output: always(output)
                ),
            )
        ],
        "gradient, always": lambda: [
            around(
                CrossCheck,
                "__init__",
                then=lambda checks, _: checks._engine.model.middle_block[0].register_full_backward_hook(
                    lambda module, to_input, to_output: always(to_input[0])
                ),
            )
        ],
    }[trial.what]()


def save_flipped(now: Moment, trial: Trial) -> Callable:
    """Writes a checkpoint's file after a bit of the copy in host memory has flipped."""

    def save(snapshot: dict[str, Tensor], file: Path) -> None:
        if now.step >= trial.step:
            flip(snapshot["master"], trial.bit)
        SAVE_FILE(snapshot, file)

    return save


def flip_loaded(batches: DeviceBatches, always: Callable[[Tensor], None]) -> None:
    """Have each micro batch of the loader flipped before it is sent."""

    def flipped(loaded: Iterator) -> Iterator:
        for batch in loaded:
            always(batch.pixels)
            yield batch

    batches._batches = flipped(batches._batches)


@contextmanager
def flipping(trial: Trial, rank: int) -> Iterator[Moment]:
    """Inside the block trainings of this process have the trial's bit flipped."""
    now = Moment()

    def begins(checks: CrossCheck, _: object) -> None:
        now.checks = checks

    def starts(*_: object) -> None:
        now.began = time.process_time()

    def stops(*_: object) -> None:
        now.checked[-1] += time.process_time() - now.began

    def counts(*_: object) -> None:
        now.backwards += 1

    def ends_step(*_: object) -> None:
        stops()
        now.step, now.backwards = now.step + 1, 0
        now.steps.append(time.process_time() - now.step_began)
        now.step_began = time.process_time()
        now.checked.append(0.0)

    restored = ways(trial, now) if trial.rank in (rank, -1) else []
    restored += [
        around(CrossCheck, "__init__", then=begins),
        around(Engine, "backward", then=counts),
        around(CrossCheck, "_verify", first=starts, then=stops),
        around(CrossCheck, "check", first=starts, then=ends_step),
    ]
    try:
        yield now
    finally:
        for owner, name, before in restored[::-1]:
            setattr(owner, name, before)


def run(trial: Trial, data: str, folder: Path, rank: int, ranks: int, device: torch.device) -> Result:
    """One training."""
    own = [
        f"steps={STEPS}", f"global_batch={4 * ranks}", "micro_batch=2", "log_every=100", f"save_every={SAVE_EVERY}",
        f"check_every={CHECK_EVERY}", f"precision={trial.precision}", f"optim.name={trial.optimizer}",
        f"model.image_size={trial.image_size}", f"model.attention_resolutions=[{trial.image_size // 2}]",
        # The watchdog of a training that ends by an error lives on in this process.
        "hang_seconds=100000", "data.workers=0", f"run_dir={folder}",
        f"data.shards={data}/shards", f"data.text={data}/text",
    ]  # fmt: skip
    config = compose_config(list({o.split("=")[0]: o for o in (*SMALL, *TINY, *own)}.values()))
    result = Result()
    with flipping(trial, rank) as now:
        try:
            assert loop.train(config, find_inputs(config), rank, ranks, device)
        except (Corrupted, CheckpointFailed) as error:
            result.found, result.said = now.step, str(error)
        assert now.checks
        masters = checksum([now.checks._engine.master])
        dist.all_reduce(masters)
        result.masters = int(masters)
        result.steps, result.checked = now.steps, now.checked[: len(now.steps)]
    result.saved = [step_of(checkpoint) for checkpoint in complete_checkpoints(folder)]
    result.nodes = read_node_faults(folder)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return result


def main(data: str, out: str, trials: str) -> None:
    rank, ranks, device = init_distributed()
    replace(loop, "show", lambda *_: None)  # no samples are drawn
    found = []
    for number, given in enumerate(json.loads(trials)):
        found.append(asdict(run(Trial(**given), data, Path(f"{out}.run-{number}"), rank, ranks, device)))
        if rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
