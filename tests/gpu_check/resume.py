"""Whether a training that was saved and loaded again ends with the same bits, and whether two runs do at all."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.gpu_check.check import LEFT_OUT, MEASURED, Check, Row, attempt, planned, verdict
from tests.gpu_check.nets import FEW_BIT, different, distance, shape
from tests.gpu_check.trainer import ENGINE, Spec, has_engine, make_trainer

SAVED, STEPS = 2, 4


def run(check: Check) -> Iterator[Row]:
    """Rows of the eager and the compiled net."""
    names = {"eager": False} if check.tiny else {"eager": False, "compiled": True}
    yield from planned(names)
    if not has_engine():
        yield Row("engine", LEFT_OUT, f"needs {' and '.join(ENGINE)}: torch's AdamW on a float32 net takes its place")
    for name, compiled in names.items():
        spec = Spec(shape(check, "small"), 2 if check.tiny else 8, FEW_BIT, compiled=compiled)
        yield attempt(name, lambda name=name, spec=spec: row(name, spec, check))


def row(name: str, spec: Spec, check: Check) -> Row:
    """First with torch's usual algorithms, then, if two runs differ, with its deterministic ones."""
    once, again, resumed, trainer = three_runs(spec, check)
    if not different(again, once):
        return compared(name, once, resumed, f"{trainer}: two runs are equal to the bit")
    text = f"{trainer}: two runs differ (weights {apart(again, once):.1e})"
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        once, again, resumed, _ = three_runs(spec, check)
    torch.use_deterministic_algorithms(False)
    if not different(again, once):
        return compared(name, once, resumed, f"{text}; with deterministic algorithms they are equal to the bit")
    culprits = sorted(
        {str(w.message).split(" does not have")[0][:60] for w in caught if "determinis" in str(w.message)}
    )
    text = f"{text}, and with deterministic algorithms too ({', '.join(culprits) or 'torch names no operator'})"
    return Row(
        name, MEASURED, f"{text}: whether a resume is exact can't be told; it is {apart(resumed, once):.1e} away"
    )


def compared(name: str, once: dict[str, Tensor], resumed: dict[str, Tensor], text: str) -> Row:
    """The row of a device that repeats itself: there the resumed run must be equal too."""
    unequal = different(resumed, once)
    wrong = f"but the resumed one differs in {len(unequal)} of {len(once)} tensors, {', '.join(unequal[:3])}"
    right = f"and so is one saved at step {SAVED} of {STEPS} and loaded again ({len(once)} tensors)"
    return verdict(name, not unequal, f"{text}, {wrong if unequal else right}")


def three_runs(spec: Spec, check: Check) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], str]:
    """The states after STEPS of a run, of the same once more, and of one that was saved and loaded; the trainer."""
    states = []
    for _ in range(2):
        trainer = make_trainer(spec, check)
        start = trainer.state()
        trainer.train(1, STEPS)
        states.append(trainer.state())
        if not apart(states[-1], start):
            raise ValueError("the training does not move the weights")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        trainer = make_trainer(spec, check)
        trainer.train(1, SAVED)
        trainer.save(path)
        del trainer
        trainer = make_trainer(spec, check)
        trainer.load(path)
        trainer.train(SAVED + 1, STEPS)
    return states[0], states[1], trainer.state(), trainer.name


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a weight's tensor."""
    return max(distance(found[name], value) for name, value in expected.items() if name.startswith("weights/"))
