"""The EMA of the weights against its definition."""

from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from train.checkpoint.format import part_file
from train.checkpoint.reader import CheckpointReader
from train.ema import EMA


def test_it_is_the_exponential_average_with_a_smaller_decay_at_first():
    generator = torch.Generator().manual_seed(0)
    engine = SimpleNamespace(master=torch.nn.Parameter(torch.randn(50, generator=generator)))
    ema = EMA(engine, 0.9)
    expected = engine.master.detach().double()
    for step in range(1, 200):
        engine.master.data.add_(torch.randn(50, generator=generator))
        ema.update(engine, step)
        decay = (1 + step) / (10 + step) if step < 80 else 0.9
        expected = decay * expected + (1 - decay) * engine.master.detach().double()
        torch.testing.assert_close(ema.average.double(), expected, rtol=1e-5, atol=1e-5)
    assert ema.average.dtype == torch.float32 and (ema.average - engine.master).abs().max() > 0.5


def test_it_stays_the_same_average_over_checkpoints_and_other_numbers_of_ranks(tmp_path):
    total, generator = 101, torch.Generator().manual_seed(0)
    flat = torch.randn(total, generator=generator)
    expected = flat.double()
    engines, emas = engines_of(flat, 2), []
    emas = [EMA(engine, 0.9) for engine in engines]
    for step in range(1, 200):
        change = torch.randn(total, generator=generator)
        flat += change
        for ema, engine, part in zip(emas, engines, engines_of(flat, len(engines)), strict=True):
            engine.master.data.copy_(part.master)
            ema.update(engine, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * flat.double()
        if step % 40 == 0:
            folder, ranks = tmp_path / str(step), {40: 1, 80: 3, 120: 2, 160: 5}[step]
            folder.mkdir()
            for rank, (ema, engine) in enumerate(zip(emas, engines, strict=True)):
                save_file({"master": engine.master.detach(), "ema": ema.average}, folder / part_file(rank))
            parts, engines = CheckpointReader(folder, len(engines)), engines_of(flat, ranks)
            emas = [EMA(engine, 0.9) for engine in engines]
            size = len(engines[0].master)
            for rank, ema in enumerate(emas):
                ema.average.copy_(parts.read("ema", rank * size, (rank + 1) * size))
    average = torch.cat([ema.average for ema in emas])[:total]
    torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-5)


def engines_of(flat: torch.Tensor, ranks: int) -> list[SimpleNamespace]:
    size = 2 * -(-len(flat) // (2 * ranks))
    padded = torch.cat([flat, torch.zeros(size * ranks - len(flat))])
    return [SimpleNamespace(master=torch.nn.Parameter(part.clone())) for part in padded.split(size)]
