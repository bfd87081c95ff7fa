"""Gradients that are added up in bf16: how wrong the sum becomes, and from where on it is refused."""

import json

import pytest
import torch
from torch import Tensor, nn

from tests.support.overlapped_steps import make_net
from tests.support.trainings import run_ranks
from tests.test_config import load
from tests.test_overlap import TINY
from train import config as config_module
from train.compose import compose_config
from train.config import MOST_BF16_SUMMANDS, accumulation, check_accumulation
from train.engine import build_engine, init_distributed
from train.monitor.step_memory import inputs

PARAMETERS = 20_000


def bf16_sum(micro_batches: int, noise: float) -> tuple[float, float]:
    """Bias and error of a gradient that autograd adds up in bf16, against the sum in fp32 of the same summands.

    noise: standard deviation of a micro batch's gradient, of the mean gradient's; 0 where all are alike.
    Returns the relative change of the sum along the true one, and the norm of the difference.
    """
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(PARAMETERS, dtype=torch.bfloat16))
    mean, true = torch.randn(PARAMETERS, generator=generator), torch.zeros(PARAMETERS)
    for _ in range(micro_batches):
        # As DeepSpeed has it: each micro batch's loss is divided by their number.
        gradient = (mean + noise * torch.randn(PARAMETERS, generator=generator)) / micro_batches
        true += gradient.bfloat16().float()
        (weight * gradient.bfloat16()).sum().backward()
    found: Tensor = weight.grad.float()  # type: ignore[union-attr]
    return float(found @ true / (true @ true)) - 1, float((found - true).norm() / true.norm())


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("micro_batches", [8, MOST_BF16_SUMMANDS])
def test_the_sum_is_right_up_to_the_limit(micro_batches, noise):
    bias, error = bf16_sum(micro_batches, noise)
    assert abs(bias) < 0.004 and error < 0.035


def test_the_sum_is_wrong_beyond_it():
    errors = [bf16_sum(n, noise=0.0)[1] for n in (8, MOST_BF16_SUMMANDS, 2 * MOST_BF16_SUMMANDS, 512)]
    assert errors == sorted(errors) and errors[2] > 0.05
    assert bf16_sum(512, noise=0.0)[0] < -0.2 and bf16_sum(512, noise=1.0)[0] < -0.04


def test_more_micro_batches_than_bf16_adds_up_are_refused_with_what_would_fit(repo):
    config = load(repo, "+experiment=if_i_xl")
    with pytest.raises(ValueError, match=r"of 512 micro batches in bf16: at most 64.*8 ranks, micro_batch=48 or prec"):
        check_accumulation(config, 1)
    assert accumulation(config, 8) == accumulation(load(repo, "+experiment=if_i_xl", "micro_batch=48"), 1) == 64
    assert accumulation(load(repo, "+experiment=if_i_xl", "precision=fp32"), 1) == 512


def print_norms() -> None:
    """The norm of a gradient that the engine adds up of so many equal ones, as a process of its own."""
    _, ranks, _ = init_distributed()
    config_module.MOST_BF16_SUMMANDS = 512
    norms = {}
    for micro_batches in (1, MOST_BF16_SUMMANDS, 512):
        config = compose_config([*TINY, "precision=bf16", f"global_batch={micro_batches}"])
        engine = build_engine(make_net(config), config, ranks)
        torch.manual_seed(0)
        batch = inputs(config.model, 1, 5)
        for _ in range(micro_batches):
            engine.backward(engine(*batch).float().square().mean())
            engine.step()
        norms[micro_batches] = float(engine.grad_norm())
        engine.engine.destroy()
    print(json.dumps(norms))


@pytest.mark.slow
def test_the_engine_adds_up_as_these_tests_do(repo):
    code = "from tests.test_accumulation import print_norms; print_norms()"
    norms = json.loads(run_ranks(repo, 1, "-c", code).splitlines()[-1])
    assert abs(norms["64"] / norms["1"] - 1) < 0.005
    assert norms["512"] / norms["1"] < 0.8
