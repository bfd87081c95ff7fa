"""The micro batches as the net gets them: in the loader's order, one ahead, with the draws of each sample's visit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data.loader.batch import Batch
from data.loader.draws import Draw, generator
from model.diffusion import Diffusion
from model.super_resolution import enlarge
from train.noise import OF_LOW_RES, DeviceBatches, draw_t_and_noise

N, SIZE, SEED, TIMESTEPS = 3, 8, 5, 100


def batch(number: int) -> Batch:
    pixels = torch.full((N, 3, SIZE, SIZE), number, dtype=torch.uint8)
    text = torch.full((N, 4, 2), number, dtype=torch.float16)
    visit = torch.arange(N) + N * number + 10**10  # epochs later than the first
    return Batch(pixels, text, visit, torch.full((N,), number / 10), [(f"sample {number}", "truncated")])


def on_device(batches: Iterator[Batch]) -> DeviceBatches:
    return DeviceBatches(batches, SEED, Diffusion(TIMESTEPS), torch.device("cpu"))


def test_each_sample_has_the_draws_of_its_visit():
    got = list(on_device(batch(number) for number in (0, 2, 255)))
    assert [found.bad[0][0] for found in got] == ["sample 0", "sample 2", "sample 255"]
    for found, number in zip(got, (0, 2, 255), strict=True):
        made = batch(number)
        assert torch.equal(found.x_start, torch.full((N, 3, SIZE, SIZE), number / 127.5 - 1))
        assert torch.equal(found.text_emb, made.text_emb) and torch.equal(found.weight, made.weight)
        for i, visit in enumerate(made.visit.tolist()):
            # As they have always been drawn: a run goes on with them after an update of this code.
            noise = generator(SEED, Draw.NOISE, visit).standard_normal((3, SIZE, SIZE), dtype=np.float32)
            assert np.array_equal(found.noise[i].numpy(), noise)
            assert found.t[i] == int(generator(SEED, Draw.TIMESTEP, visit).integers(TIMESTEPS))
        assert (found.t.dtype, found.noise.dtype) == (torch.int64, torch.float32)


def test_small_images_have_a_timestep_and_noise_of_their_own_by_visit():
    alone, both = batch(2), batch(2)
    both.low_res = torch.randint(256, (N, 3, 4, 4), dtype=torch.uint8)
    diffusion = Diffusion(TIMESTEPS)
    (of_first,), (found,) = on_device(iter([alone])), on_device(iter([both]))
    assert of_first.low_res == () and len(of_first.tensors) == 5
    for first, second in zip(of_first.tensors, found.tensors[:5], strict=True):
        assert torch.equal(first, second), "the draws of the images are what they are without small ones"
    low_res, aug_t = found.low_res
    assert found.tensors[5] is low_res and found.tensors[6] is aug_t, "they are kept for the stream that uses them"
    for i, visit in enumerate(both.visit.tolist()):
        assert aug_t[i] == int(generator(SEED, Draw.AUGMENTATION, visit).integers(TIMESTEPS))
        noise = generator(SEED, Draw.AUGMENTATION_NOISE, visit).standard_normal((3, SIZE, SIZE), dtype=np.float32)
        large = enlarge(both.low_res[i : i + 1] / 127.5 - 1, SIZE)
        expected = diffusion.q_sample(large, aug_t[i : i + 1], torch.from_numpy(noise)[None])
        assert torch.equal(low_res[i], expected[0])
    assert (low_res.dtype, aug_t.dtype) == (torch.float32, torch.int64)


def test_the_timesteps_of_small_images_are_uniform_and_not_those_of_the_images():
    visit = torch.arange(2000)
    t, _ = draw_t_and_noise(SEED, visit, (1, 1, 1), 10)
    aug_t, _ = draw_t_and_noise(SEED, visit, (1, 1, 1), 10, False, *OF_LOW_RES)
    assert aug_t.bincount(minlength=10).min() > 150 and aug_t.max() == 9
    assert abs(float(torch.corrcoef(torch.stack([t, aug_t]).float())[0, 1])) < 0.1


def test_known_draws():
    t, noise = draw_t_and_noise(0, torch.tensor([0, 123456789]), (3, 64, 64), 1000)
    assert t.tolist() == [372, 494]
    assert noise[:, 2, 63, 63].tolist() == [1.781930923461914, -2.1276772022247314]
    t, noise = draw_t_and_noise(0, torch.tensor([0, 123456789]), (3, 64, 64), 1000, False, *OF_LOW_RES)
    assert t.tolist() == [191, 267]
    assert noise[:, 2, 63, 63].tolist() == [-1.320057988166809, -0.48192667961120605]


def test_one_micro_batch_is_loaded_ahead_and_no_more():
    loaded = []

    def load() -> Iterator[Batch]:
        for number in range(3):
            loaded.append(number)
            yield batch(number)

    batches = on_device(load())
    assert loaded == []
    next(batches)
    assert loaded == [0]
    for _ in range(2):
        batches.prefetch()
        assert loaded == [0, 1]
    assert next(batches).bad == [("sample 1", "truncated")] and loaded == [0, 1]
    assert next(batches).bad == [("sample 2", "truncated")]
    batches.prefetch()
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_of_the_loader_comes_where_its_batch_is_missed():
    def load() -> Iterator[Batch]:
        yield batch(0)
        raise OSError("the disk is gone")

    batches = on_device(load())
    next(batches)
    batches.prefetch()  # the step before is still being made
    batches.prefetch()
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
