"""Silent errors of one rank: the checksum, the vote, and real trainings in which a bit is flipped."""

import json
from pathlib import Path

import pytest
import torch

from tests.chaos import TINY, differences
from tests.support.flipped_bits import CHECK_EVERY, SAVE_EVERY
from tests.support.trainings import launch, make_data, run_ranks
from train.checkpoint.format import complete_checkpoints, step_of
from train.faults import checksum as module
from train.faults.checksum import checksum, gradient_checksum
from train.faults.majority import far_off, outvoted, wrong_parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("size", [1, 3, 8, 37])
def test_each_flipped_bit_changes_the_checksum(dtype, size):
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype)
    found = {int(checksum([tensor]))}
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            found.add(int(checksum([tensor])))
            raw[byte] ^= 1 << bit
    assert len(found) == 1 + 8 * len(raw), "all differ, from the first and from one another"


def test_the_checksum_knows_the_order_and_sums_in_any(monkeypatch):
    a, b = torch.randn(100), torch.randn(100)
    assert int(checksum([a, b])) == int(checksum([a.clone(), b.clone()])) != int(checksum([b, a]))
    swapped = a.clone()
    swapped[[3, 70]] = a[[70, 3]]
    assert int(checksum([a])) != int(checksum([swapped]))
    # Two changes of one bit each, which a plain sum would not see.
    signs = a.clone()
    signs[[1, 9]] = -a[[1, 9]]
    assert int(checksum([a])) != int(checksum([signs]))
    assert int(checksum([a.view(10, 10).t()])) == int(checksum([a.view(10, 10).t().contiguous()])), "by its elements"
    assert int(checksum([a[1:]])) == int(checksum([a[1:].clone()])) and int(checksum([])) == 0
    monkeypatch.setattr(module, "CHUNK", 16)
    chunked = {int(checksum([a]))}
    for i in range(100):
        a[i] = -a[i]
        chunked.add(int(checksum([a])))
        a[i] = -a[i]
    assert len(chunked) == 101


def test_a_gradient_is_summed_part_by_part_and_leaves_the_parameters_alone():
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).bfloat16()
    x, parameters, accumulated = torch.randn(4, 7).bfloat16(), list(net.parameters()), []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated.append)  # as DeepSpeed's
    gradient = torch.autograd.grad(net(x).mean(), parameters)
    found, norm = gradient_checksum(net(x).mean(), parameters)
    assert int(found) == int(checksum([torch.stack([checksum([part]) for part in gradient])]))
    assert float(norm) == pytest.approx(float(torch.cat([part.float().flatten() for part in gradient]).norm()))
    assert all(parameter.grad is None for parameter in parameters) and not accumulated
    net(x).mean().backward()
    assert all(parameter.grad.equal(part) for parameter, part in zip(parameters, gradient, strict=True)), (
        "no hook stays"
    )


def test_a_minority_is_outvoted_and_two_are_both_named():
    assert outvoted([5, 5, 5]) == [] and outvoted([7]) == []
    assert outvoted([5, 6, 5]) == [1] and outvoted([5, 6, 5, 7, 5]) == [1, 3]
    assert outvoted([5, 6]) == [0, 1] and outvoted([5, 5, 6, 6]) == [0, 1, 2, 3] and outvoted([1, 2, 3]) == [0, 1, 2]


def test_what_is_far_off_the_median_is_told():
    nan, inf = float("nan"), float("inf")
    assert far_off([1.0, 1.005, 0.995], 0.01) == [] and far_off([1.0, 1.5, 1.0], 0.01) == [1]
    assert far_off([1.0, 1.5], 0.01) == [0, 1] and far_off([0.0, 0.0], 0.01) == []
    assert far_off([1.0, nan, 1.0], 0.01) == [1] and far_off([1.0, inf, 1.0], 0.01) == [1]
    assert far_off([nan, nan, 1.0], 0.01) == [2] and far_off([nan, nan], 0.01) == []


def test_the_masters_have_a_vote_on_the_weights_that_were_made_of_them():
    assert wrong_parts([[1, 2], [1, 2]], [1, 2]) == ([], [])
    assert wrong_parts([[1, 2], [9, 2]], [1, 2]) == ([1], []), "two copies differ, and the masters decide"
    assert wrong_parts([[1, 2], [1, 9]], [1, 2]) == ([1], []), "also in its own part"
    assert wrong_parts([[1, 2], [1, 2]], [1, 9]) == ([], [1]) and wrong_parts([[1]], [2]) == ([0], [0])


def run_trials(repo: Path, folder: Path, ranks: int, *trials: dict) -> list[dict]:
    make_data(folder / "data")
    arguments = ("-m", "tests.support.flipped_bits", str(folder / "data"), str(folder / "out"), json.dumps(trials))
    print(run_ranks(repo, ranks, *arguments))
    return json.loads((folder / "out").read_text())


@pytest.mark.slow
def test_what_lies_idle_or_is_computed_is_compared_by_two_ranks(repo, tmp_path):
    none, masters, moments, average, weights, pixels, activation, checkpoint = run_trials(
        repo, tmp_path, 2, {"what": "none"}, {"what": "masters", "rank": 0}, {"what": "moments"}, {"what": "average"},
        {"what": "weights", "step": CHECK_EVERY}, {"what": "pixels on the device, always"},
        {"what": "activation, always"}, {"what": "checkpoint in host memory"},
    )  # fmt: skip
    assert not none["found"] and none["saved"] == [SAVE_EVERY, 10]
    for found, name, rank in ((masters, "masters", 0), (moments, "moments", 1), (average, "average", 1)):
        assert found["found"] == CHECK_EVERY and not found["saved"]
        assert f"rank {rank} (device {rank} of node" in found["said"]
        assert f": its {name} changed while nothing wrote to them. Nothing" in found["said"]
    assert (
        "master is not in the file as it was on the device: the memory" in checkpoint["said"]
        and not checkpoint["saved"]
    )
    assert weights["found"] == CHECK_EVERY and "rank 1 (device 1" in weights["said"]
    assert "its weights changed" in weights["said"] and "rank 0" not in weights["said"]
    assert "rank 1 (device 1" in pixels["said"] and "its batch changed on the device. " in pixels["said"]
    # The two contradict each other, and each repeats itself.
    assert activation["found"] == CHECK_EVERY and "they contradict each other" in activation["said"]
    assert activation["said"].count("it computes another loss or gradient") == 2 and not activation["nodes"]
    assert [faults["corruption"]["times"] for faults in masters["nodes"].values()] == [1]


@pytest.mark.slow
def test_of_three_ranks_the_one_that_computes_otherwise_is_named(repo, tmp_path, capsys):
    activation, gradient, fp32, noise = run_trials(
        repo, tmp_path, 3, {"what": "activation, always", "rank": 2}, {"what": "gradient, always", "rank": 0},
        {"what": "activation, always", "precision": "fp32", "optimizer": "adamw"}, {"what": "noise", "rank": -1},
    )  # fmt: skip
    assert not noise["found"], "where no rank repeats its own bits, they are compared within a tolerance"
    assert capsys.readouterr().out.count("equal inputs do not give equal bits here (3 of 3 ranks do not repeat") == 1
    for found, rank in ((activation, 2), (gradient, 0), (fp32, 1)):
        assert found["found"] == CHECK_EVERY and not found["saved"]
        assert f"step {CHECK_EVERY}: rank {rank} (device {rank} of node" in found["said"]
        assert "and the same when it is asked again. Nothing" in found["said"]
        (faults,) = found["nodes"].values()
        assert faults["corruption"]["times"] == 1 and f"rank {rank} (device" in faults["corruption"]["what"]


@pytest.mark.slow
def test_a_run_ends_before_the_checkpoint_and_goes_on_as_if_nothing_had_happened(repo, tmp_path):
    data, run_dir = make_data(tmp_path / "data"), tmp_path / "disturbed"
    done = launch(repo, data, tmp_path / "undisturbed", *TINY, "steps=9", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    flipped = {"script": repo / "tests/support/flipped_run.py", "before": ("5",)}
    done = launch(repo, data, run_dir, *TINY, "steps=9", ranks=2, **flipped)
    assert done.returncode == 77 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "error: step 6: rank 1 (device 1 of node" in done.stderr
    assert "its masters changed while nothing wrote to them. Nothing is saved of it; leave out" in done.stderr
    assert [step_of(folder) for folder in complete_checkpoints(run_dir)] == [3]
    done = launch(repo, data, run_dir, *TINY, "steps=9", ranks=2)
    assert done.returncode == 0 and "resumes from step 3" in done.stdout, done.stderr[-3000:]
    assert not differences(run_dir, tmp_path / "undisturbed")
