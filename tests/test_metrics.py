"""The logged metrics against sums made by hand and without a wait for the device; the alerts; the files of the log."""

import json
import math
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from data.config import CaptionConfig, DataConfig
from if_train import project_version
from model.config import UNetConfig
from train.config import Config
from train.monitor.alerts import Alerts
from train.monitor.flops import training_flops
from train.monitor.metrics import STRIDE, Metrics
from train.monitor.phases import PHASES
from train.monitor.provenance import describe_start
from train.monitor.run_log import read_lines, read_metrics
from train.noise import DeviceBatch

CPU = torch.device("cpu")


@dataclass
class State:
    """The parts of an engine and its EMA that Metrics reads."""

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


def batch(t: torch.Tensor, bad: list[tuple[str, str]] | None = None, weight: torch.Tensor | None = None) -> DeviceBatch:
    weight = torch.ones(len(t), device=t.device) if weight is None else weight
    return DeviceBatch(torch.empty(0), torch.empty(0), weight, t, torch.empty(0), bad or [])


def losses(*mse: float) -> dict[str, torch.Tensor]:
    values = torch.tensor(mse)
    return {"loss": values + 1, "mse": values, "mse_mean": 10 * values, "vb": torch.ones_like(values)}


def test_the_means_are_those_of_the_good_samples(alone):
    metrics = Metrics(CPU, Config())
    state = State(torch.ones(10 * STRIDE), torch.full((10 * STRIDE,), 0.75), norm=0.5)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    t = torch.tensor([0, 249, 300, 999])
    metrics.add_micro_batch(losses(1, 2, 100, 6), batch(t, [("x", "truncated")], weight))
    metrics.add_step(state)
    state.norm = 3.5
    t = torch.tensor([500, 500, 500, 750])
    metrics.add_micro_batch(losses(3, 3, 3, 3), batch(t, [("y", "no caption")]))
    metrics.add_step(state)
    values = metrics.reduce(state, state)
    assert values["mse"] == pytest.approx((1 + 2 + 6 + 12) / 7) and values["loss"] == values["mse"] + 1
    assert [values.get(f"mse_q{i}") for i in range(4)] == [1.5, None, 3, 4.5]
    assert [values.get(f"mse_mean_q{i}") for i in range(4)] == [15, None, 30, 45] and values["mse_mean"] > values["mse"]
    assert (values["grad_norm"], values["grad_clipped_share"]) == (2.0, 0.5)
    assert values["ema_distance"] == pytest.approx(0.25)
    assert (values["bad_samples"], values["bad/truncated"], values["bad/no caption"]) == (2, 1, 1)
    assert values["samples"] == 8 and values["images_per_second"] == values["images_per_second_per_gpu"] > 0
    assert values["memory_gb"] > 0.05 and "mfu" not in values and "update_to_weight" not in values

    state.master = state.master * 1.02
    metrics.add_micro_batch(losses(1, 1, 1, 1), batch(torch.zeros(4, dtype=torch.int64)))
    metrics.add_step(state)
    state.master = state.master * 7
    metrics.add_step(state)
    values = metrics.reduce(state, state)
    assert values["update_to_weight"] == pytest.approx(0.02 / 1.02, rel=1e-4), "measured in the first step only"
    assert values["mse"] == 1 and values["bad_samples"] == 0 and not [name for name in values if "bad/" in name]
    assert metrics.bad_counts == {"truncated": 1, "no caption": 1}, "counted since the start"


def test_samples_that_lack_a_caption_are_counted_where_there_are_several(alone):
    state, t = State(torch.ones(STRIDE), torch.ones(STRIDE)), torch.tensor([0, 1])
    several = Config(data=DataConfig(captions=[CaptionConfig("txt"), CaptionConfig("recaption")]))
    for config, expected in ((Config(), [None, None]), (several, [3, 0])):
        metrics, found = Metrics(CPU, config), []
        for lacks in ([1, 2], [0]):
            for number in lacks:
                metrics.add_micro_batch(losses(1, 1), replace(batch(t), lacks=number, enlarged=5 * number))
            values = metrics.reduce(state, state)
            assert values["enlarged_samples"] == 5 * sum(lacks), "of one caption or several"
            found.append(values.get("captions_lacking"))
        assert found == expected


def test_the_time_of_a_step_is_split_by_phase(alone):
    metrics, state = Metrics(CPU, Config()), State(torch.ones(STRIDE), torch.ones(STRIDE))
    for _ in range(2):
        for name, seconds in (("data", 0.02), ("forward", 0.05)):
            with metrics.phase(name):
                time.sleep(seconds)
        metrics.add_step(state)
    values = metrics.reduce(state, state)
    assert values["seconds_data"] >= 0.02 and values["seconds_forward"] >= 0.05 and values["seconds_save"] == 0
    assert 0.1 < values["data_wait_share"] <= 0.4
    assert {f"seconds_{name}" for name in PHASES} <= set(values)
    assert metrics.reduce(state, state)["seconds_forward"] == 0


def test_a_step_does_not_wait_for_the_device():
    """A tensor on the meta device has no values, so reading one raises."""
    with torch.device("meta"):
        metrics, state = Metrics(torch.device("meta"), Config()), State(torch.ones(STRIDE), torch.ones(STRIDE))
        metrics._weights_before = torch.ones(1)
        for _ in range(2):
            with metrics.phase("forward"):
                values = losses(1, 2, 3, 4)
            on_meta, t = {k: v.to("meta") for k, v in values.items()}, torch.zeros(4, dtype=torch.int64)
            metrics.add_micro_batch(on_meta, batch(t, [("x", "bad")]))
            metrics.add_step(state)
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics._grad_norm.item()


def test_the_flop_are_those_that_were_calculated_by_hand():
    released = UNetConfig(model_channels=192, encoder_dim=4096, encoder_channels=768)
    assert training_flops(released, 77).total == pytest.approx(3 * 0.229e12, rel=5e-3)
    small = UNetConfig(model_channels=64, channel_mult=[1, 2], image_size=16, attention_resolutions=[8],
                       encoder_dim=64, encoder_channels=64)  # fmt: skip
    once, again = training_flops(small, 77), training_flops(small, 77, recompute="blocks")
    assert again.forward == once.forward and again.total > 1.1 * once.total


@pytest.fixture
def alerts_and_sent():
    sent: list[tuple[str, str]] = []
    alerts = Alerts(lambda title, text: sent.append((title, text)), stall_seconds=0.5)
    yield alerts, sent
    alerts.close()


def test_spikes_raise_one_alert(alerts_and_sent):
    alerts, sent = alerts_and_sent
    for step, spikes in enumerate((0, 2, 1, 0, 1)):
        alerts.check(step, {"loss": 0.1, "spikes": spikes})
    assert [title for title, _ in sent] == ["spike"] * 2
    assert "step 1: the mse or the gradient norm of 2 steps" in sent[0][1]


@pytest.mark.parametrize("values", [{"loss": math.nan}, {"loss": math.inf}, {"loss": 0.1, "skipped_steps": 2}])
def test_a_loss_that_is_not_finite_raises_one_alert(alerts_and_sent, values):
    alerts, sent = alerts_and_sent
    alerts.check(1, {"loss": 0.1, "skipped_steps": 0})
    alerts.check(2, values)
    alerts.check(3, values)
    assert [title for title, _ in sent] == ["loss not finite"] and "step 2: loss" in sent[0][1]


def test_a_stall_raises_one_alert(alerts_and_sent):
    alerts, sent = alerts_and_sent
    time.sleep(1.0)
    assert not sent, "the first line may take as long as a compilation"
    for step in range(3):
        alerts.check(step, {"loss": 0.1})
    time.sleep(1.0)
    assert [title for title, _ in sent] == ["stall"] and "no log line for" in sent[0][1]
    alerts.check(3, {"loss": 0.1})
    time.sleep(0.3)
    assert len(sent) == 1


def test_broken_lines_of_a_metrics_file_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n[3]\n\xff\xfe\n{"step": 4, "loss": NaN}\n{"step": 5')
    assert [line["step"] for line in read_metrics(path)] == [1, 4]
    assert read_lines(path)[1] == 4
    assert read_metrics(tmp_path / "absent") == []


def test_a_start_is_described_without_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    text = json.dumps(describe_start(Config(), 40))
    start = json.loads(text)
    assert (start["step"], start["ranks"], start["environment"]["NCCL_DEBUG"]) == (40, 1, "WARN")
    assert start["config"]["global_batch"] == 3072 and start["packages"]["torch"].startswith("2.")
    assert len(start["launch"]) >= 1 and "secret-of-mine" not in text
    assert start["version"] == project_version()
    assert start["git"] == "" or len(start["git"].removesuffix("-dirty")) == 40
