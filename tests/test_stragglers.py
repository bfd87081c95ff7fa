"""The slowest rank is named with its node, GPU and phase, from times in which no rank waits for another."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.progress import Progress
from tests.support.trainings import run_ranks
from train.config import Config
from train.faults.quarantine import read_node_faults
from train.monitor import phases
from train.monitor import stragglers as straggling
from train.monitor.alerts import BEHIND, Alerts
from train.monitor.metrics import Metrics
from train.monitor.phases import PhaseTimes
from train.monitor.progress import RunProgress
from train.monitor.stragglers import LINES, Place, Stragglers

# Seconds of a step: data, forward, backward.
USUAL = (0.005, 0.05, 0.03)
SLOWED = {"none": USUAL, "data": (0.017, 0.05, 0.03), "forward": (0.005, 0.061, 0.03)}


class State:
    """What Metrics reads of an engine and its EMA."""

    master = average = torch.ones(64)

    def grad_norm(self) -> torch.Tensor:
        return torch.tensor(1.0)


def rank_that_sleeps(out: str) -> None:
    """Steps of three ranks that sleep where they would compute and sum in each backward; the second one is slower."""
    straggling.MIN_SECONDS = 0.0  # its steps are short
    dist.init_process_group("gloo", init_method="env://")
    rank, lines = dist.get_rank(), {}
    for slow, seconds in SLOWED.items():
        metrics = Metrics(torch.device("cpu"), Config(global_batch=24, micro_batch=8))
        for _ in range(LINES + 1):
            for _ in range(3):
                for name, usual, slowed in zip(("data", "forward", "backward"), USUAL, seconds, strict=True):
                    with metrics.phase(name):
                        time.sleep(slowed if rank == 1 else usual)
                        if name == "backward":
                            dist.barrier()
                metrics.add_step(State())
            values = metrics.reduce(State(), State())
        lines[slow] = {k: v for k, v in values.items() if "straggler" in k}, vars_of(metrics.slowest)
    if rank == 0:
        Path(out).write_text(json.dumps(lines))
    dist.barrier()


def vars_of(place: Place | None) -> list:
    return [place.node, place.gpu] if place else []


def test_a_rank_that_is_a_fifth_slower_is_named_with_its_phase(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    run_ranks(repo, 3, "-m", "tests.test_stragglers", str(tmp_path / "out"))
    found = json.loads((tmp_path / "out").read_text())
    for phase, other in (("data", "forward"), ("forward", "data")):
        values, place = found[phase]
        assert values["straggler_rank"] == 1 and place == ["node7", 1]
        assert values["straggler_behind"] > BEHIND and values[f"straggler_{phase}"] > values[f"straggler_{other}"]
        assert values["straggler_behind"] > found["none"][0]["straggler_behind"]


def test_one_of_512_ranks_is_found_in_the_noise_and_a_pause_makes_none(monkeypatch):
    monkeypatch.setattr(straggling, "MIN_SECONDS", 0.5)
    monkeypatch.setattr(dist, "all_gather_object", lambda places, _: places.__setitem__(slice(None), many))
    many, draw = [Place(f"node{rank // 8}", rank % 8) for rank in range(512)], random.Random(0)
    stragglers, paused = Stragglers(), Stragglers()
    for line in range(LINES + 1):
        own = torch.tensor([[draw.gauss(m, 0.02 * m) for m in (0.01, 0.1, 0.05)] for _ in range(512)])
        own[77, 1] += 0.032
        values = stragglers.add(own)
        own[77, 1] -= 0.032
        own[99, 0] += 5.0 * (line == 3)
        quiet = paused.add(own)
        assert bool(values) == bool(quiet) == (line == LINES), "the first line is left out, then so many are needed"
    assert values["straggler_rank"] == 77 and stragglers.slowest == Place("node9", 5)
    assert values["straggler_behind"] == pytest.approx(0.2, abs=0.03)
    assert values["straggler_forward"] == pytest.approx(0.2, abs=0.03) and abs(values["straggler_data"]) < 0.02
    assert quiet["straggler_behind"] < BEHIND / 2
    monkeypatch.setattr(straggling, "MIN_SECONDS", 60.0)
    assert stragglers.add(own) and stragglers.slowest is None, "short steps scatter, so nobody is called slow"
    assert Stragglers().add(own[:1]) == {}, "one rank alone is not behind"


class Event:
    """An event of a device that has passed all of them up to `now`; a clock tells when each was reached."""

    now, clock, made = 0, [], 0

    def __init__(self, enable_timing: bool) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.number < Event.now

    def elapsed_time(self, end: "Event") -> float:
        assert end.number < Event.now, "this would wait for the device"
        return 1000.0 * (Event.clock[end.number] - Event.clock[self.number])


def test_on_a_gpu_the_own_time_is_that_of_its_events_and_its_idle_gaps(monkeypatch):
    """Two micro batches: forward 2 s, backward 3 s, of the last one 7 s with its waits; the host is late by 0.5 s."""
    monkeypatch.setattr(phases.torch.cuda, "Event", Event)
    Event.clock = [0, 2, 2, 5, 5, 5, 5.5, 7.5, 7.5, 14.5, 15, 19, 21, 23]
    times = PhaseTimes(torch.device("cuda"), accumulation=2)
    for _ in range(2):
        for name in ("data", "forward", "backward", "step"):
            with times.phase(name):
                pass
    with times.phase("save"):
        pass
    with times.phase("forward"):
        pass
    Event.now = 11
    times.read()  # the last step is still under way
    assert times.own() == [0.5, 4.0, 3.0]
    Event.now = 14
    times.read()
    assert times.own() == [0.5, 2.0, 0.0], "what the host does for a save is nobody's slowness"
    taken = times.take()
    assert (taken["forward"], taken["backward"], taken["step"]) == (6.0, 10.0, 4.0)


def test_a_straggler_is_told_once_and_counted_for_its_node(tmp_path):
    progress = RunProgress.__new__(RunProgress)  # without a run: what an alert does needs some of its parts
    progress.run_dir, progress._slowest, progress._counted = tmp_path, Place("node7", 3), set()
    told: list[tuple[str, str]] = []
    progress.progress = Progress("run", 1, "step")
    progress.tracker = type("Tracker", (), {"alert": lambda self, title, text: told.append((title, text))})()
    alerts = Alerts(progress._alert)
    slow = {"loss": 0.1, "straggler_rank": 59.0, "straggler_behind": 0.2, "straggler_data": 0.01,
            "straggler_forward": 0.15, "straggler_backward": 0.04}  # fmt: skip
    for step in (100, 150):
        alerts.check(step, slow, progress._slowest)
    alerts.check(200, slow | {"straggler_behind": 0.02}, progress._slowest)
    assert [title for title, _ in told] == ["straggler node7 GPU 3"]
    assert "step 100: rank 59 is 20% behind the median of all ranks over 5 lines, 15% of it in forward" in told[0][1]
    alerts.check(250, slow, progress._slowest)
    alerts.check(300, slow, Place("node7", 4))
    alerts.check(350, slow, Place("node7", 3))
    assert [title for title, _ in told[1:]] == [f"straggler node7 GPU {gpu}" for gpu in (3, 4, 3)]
    alerts.close()
    assert read_node_faults(tmp_path)["node7"]["straggler"]["times"] == 1, "once a start"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rank_that_sleeps(sys.argv[1])
