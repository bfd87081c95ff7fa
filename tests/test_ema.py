"""The moving average against its definition."""

from types import SimpleNamespace

import torch

from train.ema import EMA


def test_it_is_the_plain_average_with_a_smaller_decay_at_first():
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
