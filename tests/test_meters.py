"""What a run logs: against sums made by hand, without waiting for the device, and with alerts where they are due."""

import json
import math
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from data.loader.batch import Batch
from model.unet import UNetConfig
from train.config import Config
from train.monitor.alerts import Alerts
from train.monitor.flops import training_flops
from train.monitor.metrics import EVERY, PHASES, Metrics
from train.monitor.provenance import describe_start
from train.monitor.run_log import read_lines, read_metrics

CPU = torch.device("cpu")


@dataclass
class Moving:
    """What Metrics reads of an engine and an average."""

    master: torch.Tensor
    average: torch.Tensor
    norm: float = 0.0

    def grad_norm(self) -> torch.Tensor:
        return torch.tensor(self.norm, device=self.master.device)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(bad: list[tuple[str, str]], n: int = 4) -> Batch:
    return Batch(torch.zeros(n), torch.zeros(n), torch.zeros(n), torch.ones(n), bad)


def losses(*mse: float) -> dict[str, torch.Tensor]:
    values = torch.tensor(mse)
    return {"loss": values + 1, "mse": values, "vb": torch.ones_like(values)}


def test_the_means_are_those_of_the_good_samples(alone):
    meters = Metrics(CPU, Config())
    state = Moving(torch.ones(10 * EVERY), torch.full((10 * EVERY,), 0.75), norm=0.5)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    meters.add(losses(1, 2, 100, 6), torch.tensor([0, 249, 300, 999]), weight, batch([("x", "truncated")]))
    meters.add_step(state)
    state.norm = 3.5
    meters.add(losses(3, 3, 3, 3), torch.tensor([500, 500, 500, 750]), torch.ones(4), batch([("y", "no caption")]))
    meters.add_step(state)
    metrics = meters.read(state, state)
    assert metrics["mse"] == pytest.approx((1 + 2 + 6 + 12) / 7) and metrics["loss"] == metrics["mse"] + 1
    assert [metrics.get(f"mse_q{i}") for i in range(4)] == [1.5, None, 3, 4.5]
    assert (metrics["grad_norm"], metrics["grad_clipped_share"]) == (2.0, 0.5)
    assert metrics["ema_distance"] == pytest.approx(0.25)
    assert (metrics["bad_samples"], metrics["bad/truncated"], metrics["bad/no caption"]) == (2, 1, 1)
    assert metrics["samples"] == 8 and metrics["images_per_second"] == metrics["images_per_second_per_gpu"] > 0
    assert metrics["memory_gb"] > 0.05 and "mfu" not in metrics and "update_to_weight" not in metrics

    state.master = state.master * 1.02
    meters.add(losses(1, 1, 1, 1), torch.zeros(4, dtype=torch.int64), torch.ones(4), batch([]))
    meters.add_step(state)
    state.master = state.master * 7
    meters.add_step(state)
    metrics = meters.read(state, state)
    assert metrics["update_to_weight"] == pytest.approx(0.02 / 1.02, rel=1e-4), "of the first step alone"
    assert metrics["mse"] == 1 and metrics["bad_samples"] == 0 and not [name for name in metrics if "bad/" in name]
    assert meters.bad == {"truncated": 1, "no caption": 1}, "those since the start"


def test_the_time_of_a_step_is_split_by_phase(alone):
    meters, state = Metrics(CPU, Config()), Moving(torch.ones(EVERY), torch.ones(EVERY))
    for _ in range(2):
        for name, seconds in (("data", 0.02), ("forward", 0.05)):
            with meters.phase(name):
                time.sleep(seconds)
        meters.add_step(state)
    metrics = meters.read(state, state)
    assert metrics["seconds_data"] >= 0.02 and metrics["seconds_forward"] >= 0.05 and metrics["seconds_save"] == 0
    assert 0.1 < metrics["data_wait_share"] <= 0.4
    assert {f"seconds_{name}" for name in PHASES} <= set(metrics)
    assert meters.read(state, state)["seconds_forward"] == 0


def test_nothing_of_a_step_waits_for_the_device():
    """On the meta device there are no numbers: whoever reads one fails."""
    with torch.device("meta"):
        meters, state = Metrics(torch.device("meta"), Config()), Moving(torch.ones(EVERY), torch.ones(EVERY))
        meters._before = torch.ones(1)
        for _ in range(2):
            with meters.phase("forward"):
                values = losses(1, 2, 3, 4)
            meters.add({k: v.to("meta") for k, v in values.items()}, torch.zeros(4, dtype=torch.int64),
                       torch.ones(4), batch([("x", "bad")]))  # fmt: skip
            meters.add_step(state)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meters._grad_norm.item()


def test_the_flop_are_those_that_were_calculated_by_hand():
    released = UNetConfig(model_channels=192, encoder_channels=768)
    assert training_flops(released, 77).total == pytest.approx(3 * 0.229e12, rel=5e-3)
    recomputing = UNetConfig(model_channels=64, channel_mult=[1, 2], image_size=16, attention_resolutions=[8],
                             encoder_dim=64, encoder_channels=64, memory="recompute_blocks")  # fmt: skip
    plain = replace(recomputing, memory="keep")
    assert training_flops(recomputing, 77) == training_flops(plain, 77), "the MFU counts nothing that is done again"
    again = training_flops(plain, 77, recompute="recompute_blocks")
    assert again.forward == training_flops(plain, 77).forward and again.total > 1.1 * training_flops(plain, 77).total


@pytest.fixture
def told():
    heard: list[tuple[str, str]] = []
    alerts = Alerts(lambda title, text: heard.append((title, text)), stall_seconds=0.5)
    yield alerts, heard
    alerts.close()


def test_a_leap_of_the_loss_is_told_once(told):
    alerts, heard = told
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        alerts.line(step, {"loss": 0.1 + 0.01 * float(torch.randn((), generator=generator))})
    assert not heard
    for step in range(200, 205):
        alerts.line(step, {"loss": 0.3})
    assert [title for title, _ in heard] == ["loss spike"] and "step 200: loss 0.3, the median" in heard[0][1]
    alerts.line(205, {"loss": 0.1})
    alerts.line(206, {"loss": 0.3})
    assert len(heard) == 2, "again after it was well"


@pytest.mark.parametrize("metrics", [{"loss": math.nan}, {"loss": math.inf}, {"loss": 0.1, "skipped_steps": 2}])
def test_what_is_not_finite_is_told(told, metrics):
    alerts, heard = told
    alerts.line(1, {"loss": 0.1, "skipped_steps": 0})
    alerts.line(2, metrics)
    alerts.line(3, metrics)
    assert [title for title, _ in heard] == ["loss not finite"] and "step 2: loss" in heard[0][1]


def test_a_stall_is_told_while_it_lasts(told):
    alerts, heard = told
    time.sleep(1.0)
    assert not heard, "the first line may take as long as a compilation"
    for step in range(3):
        alerts.line(step, {"loss": 0.1})
    time.sleep(1.0)
    assert [title for title, _ in heard] == ["stall"] and "no log line for" in heard[0][1]
    alerts.line(3, {"loss": 0.1})
    time.sleep(0.3)
    assert len(heard) == 1


def test_a_metrics_file_cut_mid_line_is_read_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n[3]\n\xff\xfe\n{"step": 4, "loss": NaN}\n{"step": 5')
    assert [line["step"] for line in read_metrics(path)] == [1, 4]
    assert read_lines(path)[1] == 4
    assert read_metrics(tmp_path / "absent") == []


def test_a_start_is_described_without_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    told = json.dumps(describe_start(Config(), 40))
    start = json.loads(told)
    assert (start["step"], start["ranks"], start["environment"]["NCCL_DEBUG"]) == (40, 1, "WARN")
    assert start["config"]["global_batch"] == 3072 and start["packages"]["torch"].startswith("2.")
    assert len(start["launch"]) >= 1 and "secret-of-mine" not in told
    assert start["git"] == "" or len(start["git"].removesuffix("-dirty")) == 40
