"""A spike is found by robust statistics, told with its samples, and by choice left out: bit for bit as if never met."""

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader.stream import MicroBatches
from model.diffusion import Diffusion
from model.losses import training_losses
from tests.chaos import TINY, differences
from tests.support.bad_pictures import draw_over
from tests.support.trainings import SMALL, launch, make_data
from train.checkpoint.format import latest_checkpoint, leave_out, read_manifest
from train.compose import compose_config
from train.faults.spikes import MIN_STEPS, WINDOW, SpikeMemory, Spikes, spike_limit
from train.inputs import find_inputs

# Steps after which the limits are low enough that a bad batch is above them, 13 epochs; and a batch with few large t.
# The samples do not come again before the end.
LEARNED, END, BAD_BATCH, BAD = 156, 162, 157, (0, 1, 2, 3, 4, 7)
LEARN = (*TINY, f"steps={END}", "save_every=52", "keep_checkpoints=99", "data.cond_drop_prob=0", "optim.lr_peak=3e-3")


class Alone:
    """One rank's consensus."""

    def mean(self, values: torch.Tensor):
        return values.tolist


def found(values: list[float], factor: float = 20.0, norm=lambda step: 1.0, memory: SpikeMemory | None = None):
    """The steps at which a series of errors is told, each with the step in which that is known."""
    spikes, told = Spikes(factor, memory or SpikeMemory(), Alone()), []
    for step, value in enumerate(values):
        spikes.add(step, [(step, torch.tensor([value, value]))], torch.tensor(norm(step)))
        while spike := spikes.judge():
            told.append((spike[0].step, step, spike[1]))
    while spike := spikes.judge(all_steps=True):
        told.append((spike[0].step, len(values), spike[1]))
    return told


def test_a_leap_is_found_two_steps_later_and_noise_is_none():
    draw = random.Random(0)
    values = [0.1 * (1 + 3 / (1 + i)) * draw.lognormvariate(0, 0.2) for i in range(600)]
    assert not found(values)
    values[MIN_STEPS - 1] = values[400] = values[598] = 3.0
    told = found(values)
    assert [(step, when) for step, when, _ in told] == [(400, 402), (598, 600)], "none before there is a median"
    assert "mse 3 (the median of the 200 steps before is 0.1" in told[0][2] and "grad_norm" not in told[0][2]
    (by_norm,) = found([0.1] * 60, norm=lambda step: 50.0 if step == 55 else 1.0)
    assert by_norm[0] == 55 and by_norm[2].startswith("grad_norm 50 (the median of the 55 steps before is 1,")
    assert not found([0.1] * 40 + [0.1001] * 40), "equal values have no deviation, and rounding is no spike"


def test_a_new_level_becomes_the_usual_and_spikes_before_hide_none():
    told = [step for step, _, _ in found([0.1] * 200 + [1.0] * 200)]
    assert told == list(range(200, 300)), "until the median has followed"
    every_tenth = [5.0 if step % 10 == 9 else 0.1 for step in range(100)]
    assert [step for step, _, _ in found(every_tenth)] == list(range(39, 100, 10))


def test_the_limit_is_that_of_median_and_deviation():
    values = np.random.default_rng(0).normal(10.0, 1.0, 200_000).tolist()
    assert spike_limit(values, 6.0) == pytest.approx(16.0, abs=0.05)
    assert spike_limit(values[:1000] + [1e9] * 200, 6.0) < 18.0


def test_what_is_remembered_goes_on_as_if_nothing_had_stopped():
    draw = random.Random(1)
    values = [draw.lognormvariate(0, 0.3) for _ in range(300)]
    values[120] = values[250] = 40.0
    memory = SpikeMemory()
    first = found(values[:110], memory=memory)
    rest = [(step + 110, text) for step, _, text in found(values[110:], memory=memory)]
    assert not first and rest == [(step, text) for step, _, text in found(values)]
    assert len(memory.window["mse"]) == WINDOW


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def go_on_from(run_dir: Path, of: Path, step: int) -> Path:
    """A copy of a run, without its checkpoints after a step."""
    shutil.copytree(of, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return run_dir


def test_the_last_timestep_makes_the_loss_leap_and_hardly_its_gradient():
    """So the mse is judged. At t = 999 the mean of x_998 counts its error 720 times, and the variance has no room."""
    diffusion, t = Diffusion(1000), torch.tensor([999, 998, 500])
    x_start, noise = torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 4)
    output = torch.zeros(3, 6, 4, 4, requires_grad=True)  # eps is 1 off: mse = 1
    losses = training_losses(diffusion, output, x_start, diffusion.q_sample(x_start, t, noise), t, noise)
    assert losses["mse"].tolist() == [1, 1, 1]
    last, before, middle = losses["vb"].tolist()
    assert last == pytest.approx(720.6, abs=0.1) and before < 2.2 and middle < 0.01
    losses["loss"].sum().backward()
    of_eps, of_variance = output.grad.split(3, dim=1)
    assert of_variance[0].abs().max() < 0.04 * of_eps[0].abs().max()


@pytest.fixture(scope="module")
def learned(repo, data, tmp_path_factory) -> Path:
    """A run of which the checkpoint of step LEARNED is the start of others."""
    run_dir = tmp_path_factory.mktemp("learned") / "run"
    done = launch(repo, data, run_dir, *LEARN)
    assert done.returncode == 0 and "SPIKE" not in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    return go_on_from(run_dir.with_name("start"), run_dir, LEARNED)


@pytest.fixture(scope="module")
def bad(data) -> list[str]:
    """The names of six of the eight samples of a batch."""
    own = (*LEARN, f"data.shards={data / 'shards'}", f"data.text={data / 'text'}")
    config = compose_config(list({o.split("=")[0]: o for o in (*SMALL, *own)}.values()))
    inputs, size = find_inputs(config), config.global_batch
    stream = MicroBatches(
        config.data, inputs.datasets, inputs.meta, image_size=16, seed=config.seed, global_batch=size, micro_batch=size
    )
    return [stream.sample_name(BAD_BATCH, i) for i in BAD]


@pytest.fixture(scope="module")
def spoiled(data, bad, tmp_path_factory) -> Path:
    """The data with those pictures drawn over."""
    copy = shutil.copytree(data, tmp_path_factory.mktemp("spoiled") / "data")
    draw_over(copy / "shards", bad)
    return copy


def left_out_by(run_dir: Path) -> list[int]:
    return [entry["batch"] for entry in read_manifest(latest_checkpoint(run_dir))["spikes"]["left_out"]]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_pictures_are_told_and_a_run_that_goes_back_equals_one_that_never_had_them(
    repo, data, spoiled, bad, learned, tmp_path, ranks
):
    """At the default factor."""
    back = go_on_from(tmp_path / "back", learned, LEARNED)
    done = launch(repo, spoiled, back, *LEARN, "on_spike=rollback", ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "gloo meets" not in done.stdout, "a new start is given what the first one was"
    ((step, batch, what, samples),) = re.findall(r"SPIKE step (\d+), batch (\d+): (.*); highest mse: (.*)", done.stdout)
    assert int(batch) == BAD_BATCH == int(step) - 1 and "grad_norm" in what and "the limit" in what
    named = [re.sub(r" \(.*", "", sample) for sample in samples.split(", ")]
    assert set(named[: len(bad)]) == set(bad) and len(named) == 8, samples
    assert f"back to the latest checkpoint, and without batch {BAD_BATCH}" in done.stdout
    assert f"leaves out the batches [{BAD_BATCH}] for spikes" in done.stdout and left_out_by(back) == [BAD_BATCH]
    listed = "".join(file.read_text() for file in (back / "quarantine").iterdir())
    assert all(f'"sample": "{name}", "reason": "in a spike, mse' in listed for name in named)

    never = go_on_from(tmp_path / "never", learned, LEARNED)
    for folder in (never / "checkpoints").iterdir():
        leave_out(folder, {"batch": BAD_BATCH, "what": "by hand"})
    # What was noted as the run went back is enough for a later resume, which need not look for spikes.
    again = go_on_from(tmp_path / "again", back, LEARNED)
    for run_dir, shards in ((never, data), (again, spoiled)):
        done = launch(repo, shards, run_dir, *LEARN, ranks=ranks)
        assert done.returncode == 0 and "SPIKE" not in done.stdout, done.stderr[-3000:]
        assert left_out_by(run_dir) == [BAD_BATCH] and not differences(run_dir, back)


@pytest.mark.slow
def test_a_run_ends_in_one_line_after_so_many_rollbacks(repo, spoiled, learned, tmp_path):
    run_dir = go_on_from(tmp_path / "run", learned, LEARNED)
    leave_out(latest_checkpoint(run_dir), {"batch": 10_000, "what": "another spike"})
    done = launch(repo, spoiled, run_dir, *LEARN, "on_spike=rollback", "max_rollbacks=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "error: step " in done.stderr
    assert "the run left out 1 batches for spikes before, max_rollbacks=1: lower optim.lr_peak" in done.stderr
    run_dir = go_on_from(tmp_path / "met", learned, LEARNED)
    done = launch(repo, spoiled, run_dir, *LEARN)
    assert done.returncode == 0 and f"batch {BAD_BATCH}: " in done.stdout, "by default it is told, and the run goes on"


def test_a_checkpoint_from_before_the_mse_was_judged_has_an_empty_window():
    assert SpikeMemory(left_out=[{"batch": 3, "what": ""}], window={"loss": [1.0]}).window == {
        "mse": [],
        "grad_norm": [],
    }
