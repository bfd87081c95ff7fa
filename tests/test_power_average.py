"""Power-function averages: against their definition, over skipped steps and ranks, and in fp32 over a long training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.test_ema import engines_of
from train.checkpoint.format import part_file
from train.checkpoint.reader import CheckpointReader
from train.ema import EMA
from train.weights import power_average
from train.weights.power_average import LONGEST, TRACKED, coefficients, decay, gamma_of, last_update


def shares(length: float, step: int, total: int) -> np.ndarray:
    """How much the weights of each of the steps 1..total are worth in the average of a step, by its definition."""
    edges = np.minimum(np.arange(total + 1), step) / step
    return np.diff(edges ** (gamma_of(length) + 1))


@pytest.mark.parametrize("length", [0.01, *TRACKED.values(), 0.2, LONGEST])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    share, steps = shares(length, 20_000, 20_000), np.arange(20_000) + 0.5
    mean = share @ steps
    assert np.sqrt(share @ (steps - mean) ** 2) / 20_000 == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("updates", [4096, 16])
def test_the_tracked_averages_are_the_sums_that_their_profiles_say(monkeypatch, updates):
    """Also where steps are skipped, which make no weights, and where not every step is averaged in."""
    monkeypatch.setattr(power_average, "UPDATES", updates)
    generator, made = torch.Generator().manual_seed(0), 0
    engine = SimpleNamespace(master=torch.nn.Parameter(torch.randn(50, generator=generator)), schedule_step=0)
    ema, path = EMA(engine, 0.9, tracked=True), []
    for step in range(1, 240):
        if step % 7 == 0:
            continue
        engine.master.data.add_(torch.randn(50, generator=generator))
        engine.schedule_step = made = made + 1
        path.append(engine.master.detach().double().numpy().copy())
        ema.update(engine, step)
    updated = [step for step in range(1, made + 1) if last_update(step) == step]
    assert len(updated) == made if updates == 4096 else 16 <= len(updated) < made / 2
    for name, length in TRACKED.items():
        weights = np.diff((np.array([0, *updated]) / updated[-1]) ** (gamma_of(length) + 1))
        expected = weights @ np.array(path)[np.array(updated) - 1]
        np.testing.assert_allclose(ema.averages[name].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_changes_of_ranks_leave_every_bit(tmp_path):
    total, generator = 1001, torch.Generator().manual_seed(0)
    flat = torch.randn(total, generator=generator)
    whole = SimpleNamespace(master=torch.nn.Parameter(flat.clone()), schedule_step=0)
    of_one, engines = EMA(whole, 0.9, tracked=True), engines_of(flat, 2)
    emas = [EMA(engine, 0.9, tracked=True) for engine in engines]
    for step in range(1, 100):
        flat += torch.randn(total, generator=generator)
        whole.master.data.copy_(flat)
        whole.schedule_step = step
        of_one.update(whole, step)
        for ema, engine, part in zip(emas, engines, engines_of(flat, len(engines)), strict=True):
            engine.master.data.copy_(part.master)
            engine.schedule_step = step
            ema.update(engine, step)
        if step % 20 == 0:
            folder, ranks = tmp_path / str(step), {20: 1, 40: 3, 60: 2, 80: 5}[step]
            folder.mkdir()
            for rank, ema in enumerate(emas):
                save_file(ema.averages, folder / part_file(rank))
            parts, engines = CheckpointReader(folder, len(engines)), engines_of(flat, ranks)
            emas, size = [EMA(engine, 0.9, tracked=True) for engine in engines], len(engines[0].master)
            for rank, ema in enumerate(emas):
                for name, average in ema.averages.items():
                    average.copy_(parts.read(name, rank * size, (rank + 1) * size))
    for name, average in of_one.averages.items():
        assert torch.equal(torch.cat([ema.averages[name] for ema in emas])[:total], average), name


@pytest.mark.parametrize("length", [0.03, 0.07, 0.1, 0.15, 0.25])
def test_what_is_left_is_the_distance_of_the_profiles(length):
    total, every = 6400, 400
    steps = [step for step in range(every, total + 1, every) for _ in TRACKED]
    lengths = list(TRACKED.values()) * (total // every)
    (factors,), (left,) = coefficients(steps, lengths, total, [length])
    found = sum(f * shares(own, step, total) for f, step, own in zip(factors, steps, lengths, strict=True))
    wanted = shares(length, total, total)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) == pytest.approx(left, rel=0.02, abs=1e-6)
    assert left < (1e-6 if length in TRACKED.values() else 0.2)
    # No other sum comes nearer.
    for at in range(0, len(factors), 5):
        other = found + 1e-3 * shares(lengths[at], steps[at], total)
        assert np.linalg.norm(other - wanted) >= np.linalg.norm(found - wanted)


def test_the_times_of_the_updates_follow_from_the_step_alone():
    updated = [step for step in range(1, 40_000) if last_update(step) == step]
    assert updated[: 2 * 4096] == list(range(1, 2 * 4096 + 1))
    for before, step in zip([0, *updated], updated, strict=False):
        assert last_update(step - 1) == before and step - before <= max(1, step / 4096)
        assert decay(3.0, step) == pytest.approx((before / step) ** 4)


@pytest.mark.slow
def test_fp32_is_enough_for_a_long_training_because_it_is_not_averaged_in_at_every_step():
    """Weights that Adam moves with noise towards others, the rate falling along a cosine to a ten-thousandth."""
    generator, steps = torch.Generator().manual_seed(0), 400_000
    target, weights = (0.03 * torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    momentum = torch.zeros(64, dtype=torch.float64)
    engine = SimpleNamespace(master=weights.float(), schedule_step=0)
    ema = EMA(engine, 0.9999, tracked=True)
    gammas = {name: gamma_of(length) for name, length in TRACKED.items()}
    exact, every_step = ({name: torch.zeros(64, dtype=dtype) for name in gammas} for dtype in (torch.float64, None))
    rates = 2.5e-5 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) + 5e-9
    for step in range(1, steps + 1):
        if step % 1000 == 1:
            noise = torch.randn(1000, 64, generator=generator, dtype=torch.float64)
        momentum.lerp_(0.3 * noise[(step - 1) % 1000] + 10 * (weights - target), 0.1)
        weights.sub_(momentum, alpha=rates[step])
        engine.master, engine.schedule_step = weights.float(), step
        if last_update(step) == step:
            ema.update(engine, step)
        for name, gamma in gammas.items():
            new = 1 - (1 - 1 / step) ** (gamma + 1)
            exact[name].lerp_(weights, new)
            every_step[name].lerp_(engine.master, new)
    for name, average in exact.items():
        assert (ema.averages[name] - average).norm() < 2e-5 * average.norm(), name
        assert (every_step[name] - average).norm() > 1e-4 * average.norm(), name
