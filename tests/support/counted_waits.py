"""What makes the host wait for the device in trainings by train/loop.py, counted on a CPU, step by step.

On a CPU nothing waits, but the calls are those that wait on a GPU: the accelerator's synchronize; numbers read from a
tensor; copies that are not asked to go on by themselves. A GPU has more, in operators that look at a device's values
only there; tests/gpu_check/syncs.py counts those.

python -m tests.support.counted_waits DATA OUT trains four times on DATA and writes what it counts to OUT, JSON. A
process of its own, for it joins a group of ranks. Run by tests/test_no_host_sync.py.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.chaos import TINY
from tests.support.trainings import SMALL
from train import loop
from train.compose import compose_config
from train.engine import Engine, init_distributed
from train.faults.guard import Guard
from train.inputs import find_inputs
from train.noise import DeviceBatches

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, ACCUMULATE, MICRO_BATCH = 5, 2, 4
# Operators that give numbers to the host, and methods that do it without an operator where the tensor is on a CPU.
OPERATORS = {"aten::_local_scalar_dense", "aten::nonzero"}
METHODS = {"tolist", "cpu", "numpy"}
# Files that are on the way from the place that called torch.
PASSED = re.compile(r"/torch/|tests/support/counted_waits\.py$")


class CountedWaits:
    """Counts in a block, by what and where: 'read: train/noise.py draw_t_and_noise'.

    What: synchronize, read, and in the project's own code copy and blocking copy, to a device.
    steps: a Counter for each step that was made.  order: of the micro batches sent, and of the engine's steps.
    """

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.order: list[str] = []
        self._now: Counter[str] = Counter()
        self._modes = (_Methods(self), _Operators(self))

    def add(self, what: str, own_only: bool = False) -> None:
        """Count one at the place that called torch.  own_only: unless that is a library."""
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_name.startswith("<") or PASSED.search(frame.f_code.co_filename)):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        own = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if own or not own_only:
            place = path.relative_to(ROOT).as_posix() if own else "/".join(path.parts[-2:])
            self._now[f"{what}: {place} {frame.f_code.co_name}"] += 1

    def end_step(self) -> None:
        """What comes from here on is the next step's."""
        self.steps.append(self._now)
        self._now = Counter()

    def __enter__(self) -> "CountedWaits":
        self._restored = [
            replace(get_accelerator(), "synchronize", lambda *_: self.add("synchronize")),
            replace(torch.cuda, "synchronize", lambda *_: self.add("synchronize")),
            after(Guard, "check_step", self.end_step),
            after(DeviceBatches, "send", lambda: self.order.append("send")),
            after(Engine, "step", lambda: self.order.append("step")),
        ]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in self._modes[::-1]:
            mode.__exit__(*error)
        for owner, name, before in self._restored:
            setattr(owner, name, before)


class _Methods(TorchFunctionMode):
    def __init__(self, waits: CountedWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in METHODS:
            self.waits.add("read")
        elif name == "cuda" or (
            name == "to" and any(isinstance(to, (torch.device, str)) for to in (*args, *kwargs.values()))
        ):
            self.waits.add("copy" if kwargs.get("non_blocking") else "blocking copy", own_only=True)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: CountedWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in OPERATORS:
            self.waits.add("read")
        return func(*args, **(kwargs or {}))


def replace(owner, name: str, new) -> tuple:
    """Set an attribute; what sets it back."""
    before = getattr(owner, name)
    setattr(owner, name, new)
    return owner, name, before


def after(owner, name: str, then) -> tuple:
    """Call then() after each call of a method; what sets it back."""
    before = getattr(owner, name)

    def both(*args):
        result = before(*args)
        then()
        return result

    return replace(owner, name, both)


def with_a_number_read(*args):
    """The losses, of which the loop looks at the mean."""
    found = LOSSES(*args)
    found["loss"].mean().item()
    return found


def with_the_timer(*, config, **given):
    """DeepSpeed's engine with its throughput timer, as it comes."""
    return INITIALIZE(config={name: value for name, value in config.items() if name != "timers"}, **given)


LOSSES, INITIALIZE = loop.training_losses, deepspeed.initialize
WAYS = {
    "as it is": (loop, "training_losses", LOSSES),
    "a number read": (loop, "training_losses", with_a_number_read),
    "the timer": (deepspeed, "initialize", with_the_timer),
    "the second stage": (loop, "training_losses", LOSSES),
}
KEYS = {"the second stage": ["model.low_res_size=8"]}


def main(data: str, out: str) -> None:
    rank, ranks, device = init_distributed()
    found = {}
    for way, change in WAYS.items():
        own = [
            f"steps={STEPS}", f"global_batch={ACCUMULATE * MICRO_BATCH}", f"micro_batch={MICRO_BATCH}", "log_every=100",
            "save_every=100", "precision=bf16", f"run_dir={out}.{len(found)}", f"data.shards={data}/shards",
            f"data.text={data}/text", *KEYS.get(way, []),
        ]  # fmt: skip
        config = compose_config(list({o.split("=")[0]: o for o in (*SMALL, *TINY, *own)}.values()))
        restored = replace(*change)
        with CountedWaits() as waits:
            assert loop.train(config, find_inputs(config), rank, ranks, device)
        replace(*restored)
        found[way] = {"steps": waits.steps, "order": waits.order}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
