"""The simulated days of a run: against the closed form where that is exact, by hand, and as a command."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from launch.cost.estimate import estimate_step, make_plan
from launch.cost.options import PlanOptions
from launch.interruptions import young_daly
from launch.interruptions.events import BEGIN, LIMIT, REQUEUE_SECONDS, Life, shares, simulate, simulate_runs
from launch.interruptions.options import KINDS, LifetimeOptions
from launch.interruptions.page import Runs, percent
from launch.lifetime import main
from tests.test_plan import TINY
from train.compose import compose_config

# What Young and Daly assume: a save stops the training, faults end all ranks at once, and each costs the same.
BLOCKING = Life(
    steps=500_000, step=0.5, save_every=1000, copy=30.0, write=0.0, rates={"process": 1 / 15_000}, hang=600.0, end=0.0,
    start=200.0, load=0.0, compiling=0.0, cached=0.0, job=0.0, queue=0.0, in_place=True, spares=0, shared_cache=False,
    check_every=100, memory_every=0,
)  # fmt: skip
# The kinds, saves beside the training, time limits.
REAL = replace(
    BLOCKING, rates=dict.fromkeys(KINDS, 1 / 50_000), copy=0.1, write=20.0, end=20.0, load=10.0, compiling=300.0,
    cached=10.0, job=86_400.0, queue=600.0, spares=1,
)  # fmt: skip


@pytest.mark.parametrize("save_every", [200, 2000, 10_000])
def test_daly_where_it_is_exact(save_every):
    life = replace(BLOCKING, save_every=save_every)
    outcomes = simulate_runs(life, 200)
    found = shares(life, outcomes)
    error = found.std() / len(found) ** 0.5
    assert error < 0.003 and abs(found.mean() - young_daly.share(life)) < 4 * error


def test_the_best_interval_is_youngs_and_dalys():
    every = np.geomspace(300, 12_000, 12).astype(int)
    lives = [replace(BLOCKING, save_every=int(steps)) for steps in every]
    found = [shares(life, simulate_runs(life, 60)).mean() for life in lives]
    best = every[np.argmax(found)]
    for closed in (young_daly.young(BLOCKING), young_daly.daly(BLOCKING)):
        assert 0.6 < best / closed < 1.7, (best, closed)
    assert young_daly.daly(BLOCKING) < young_daly.young(BLOCKING)


def test_the_closed_form_is_near_where_it_is_not_exact():
    life = replace(REAL, rates={kind: rate / 4 for kind, rate in REAL.rates.items()}, spares=100)
    assert shares(life, simulate_runs(life, 200)).mean() == pytest.approx(young_daly.share(life), abs=0.005)


@pytest.mark.parametrize("life", [BLOCKING, REAL, replace(REAL, in_place=False), replace(REAL, memory_every=50)])
def test_no_second_is_lost_from_the_books(life):
    for outcome in simulate_runs(life, 20):
        booked = life.steps * life.step + outcome.saving + sum(outcome.lost.values())
        assert outcome.seconds == pytest.approx(booked, abs=0.01)
        assert min(outcome.lost.values()) > -1e-6


@pytest.mark.parametrize("begin", [0, 1000, 1234])
def test_steps_and_checkpoints_made_by_hand(begin):
    """Counted step by step: a save stops the run for 3 s, and the checkpoint is there 20 s later."""
    life = replace(REAL, save_every=100, copy=3.0, write=20.0, steps=2000)
    now, complete = 0.0, {0.0: begin}
    at = {0.0: begin}
    for step in range(begin + 1, begin + 351):
        now += life.step
        at[now] = step
        if step % 100 == 0:
            now += 3.0
            complete[now + 20.0] = step
    for seconds in np.arange(0.1, now - 1, 0.73):
        made = max(step for when, step in at.items() if when <= seconds)
        saved = max(step for when, step in complete.items() if when <= seconds)
        assert life.made(begin, seconds) == (made, saved), seconds
    assert life.elapsed(begin, step) == pytest.approx(now)


def test_a_save_that_takes_longer_than_its_interval_holds_the_run_up():
    life = replace(REAL, save_every=10, write=20.0, copy=1.0)
    assert life.pause == 1.0 + 20.0 - 5.0
    assert shares(life, [simulate(life, np.random.default_rng(0))])[0] < 5 / 21


def test_the_time_limit_by_hand():
    """No faults: in a day of 86,400 s, of which Slurm's warning takes the last 600, each start takes 210 or 500 s."""
    never = replace(REAL, rates={"process": 1e-12}, copy=0.0, write=0.0, queue=0.0, steps=400_000)
    outcome = simulate(never, np.random.default_rng(0))
    first, later = 200 + 300, 200 + 10 + 300
    assert outcome.requeues == 2 and outcome.lost[LIMIT, "wait"] == 2 * REQUEUE_SECONDS
    assert outcome.lost[BEGIN, "start"] == first and outcome.lost[LIMIT, "start"] == 2 * later
    assert outcome.redone == 0 and outcome.seconds == pytest.approx(200_000 + first + 2 * later + 240, abs=1)
    assert simulate(replace(never, job=0.0), np.random.default_rng(0)).seconds == 200_000 + first


@pytest.mark.parametrize(
    "never",
    [
        replace(REAL, job=3600.0, compiling=4000.0, rates={"process": 1e-9}),
        replace(REAL, rates={"process": 1.0}),
        replace(REAL, rates={"process": 1e9}, end=0.0, write=0.0),
    ],
)
def test_a_run_that_never_ends_is_refused(never):
    with pytest.raises(ValueError, match="never ends"):
        simulate(never, np.random.default_rng(0))
    if never.job == 3600:
        assert percent(Runs.of(never, LifetimeOptions(runs=3)).share) == "-"
    assert young_daly.share(replace(never, rates={"process": 1.0})) < 1e-9


def test_a_compilation_that_was_cut_short_is_made_again():
    life = replace(REAL, rates={"process": 1 / 300}, compiling=5000.0, start=0.0, load=0.0, cached=0.0, steps=100)
    with pytest.raises(ValueError, match="never ends"):
        simulate(replace(life, rates={"process": 1 / 100}), np.random.default_rng(0))


def test_a_copy_in_memory_is_no_checkpoint():
    """Of two faults before the first checkpoint, the second loses all: once the copies, once the steps in them."""
    life = replace(REAL, save_every=10**6, steps=20_000, memory_every=50, spares=1000, job=0.0)
    only = replace(life, rates={"process": 1 / 5000})
    both = replace(life, rates={"process": 1 / 500, "corruption": 1 / 5000})
    assert sum(outcome.redone for outcome in simulate_runs(only, 10)) < 50 * 100
    redone, corrupted = (
        sum(counted(outcome) for outcome in simulate_runs(both, 10))
        for counted in (lambda outcome: outcome.redone, lambda outcome: outcome.faults["corruption"])
    )
    assert redone > 2500 * corrupted


def test_spares_keep_the_job_out_of_the_queue():
    life = replace(REAL, rates={"node": 1 / 50_000}, job=0.0, steps=1_000_000)
    requeues = [
        np.mean([outcome.requeues for outcome in simulate_runs(replace(life, spares=n), 50)]) for n in (0, 1, 2)
    ]
    faults = np.mean([outcome.faults["node"] for outcome in simulate_runs(life, 50)])
    assert faults == pytest.approx(10, rel=0.2)
    # Each spare takes one fault more between two times in the queue.
    assert requeues[0] > 1.8 * requeues[1] > 2 * 1.1 * requeues[2] > 0
    in_place = replace(life, rates={"process": 1 / 50_000}, spares=0)
    assert not any(outcome.requeues for outcome in simulate_runs(in_place, 20)), "the node is well"
    assert all(o.requeues == o.faults.total() for o in simulate_runs(replace(in_place, in_place=False), 20))


@pytest.mark.parametrize(
    ("kind", "seconds"), [("process", 20.0), ("node", 20.0), ("link", 600.0), ("hang", 600.0), ("corruption", 20 + 15)]
)
def test_how_long_a_fault_is_not_known(kind, seconds):
    """A silent one for the limit of a hang; a wrong result until the next look, 30 steps on."""
    assert REAL.until_all_ended(kind, made=370) == seconds


def test_a_copy_in_memory_spares_steps_and_not_after_corruption():
    for kind, fewer in (("process", True), ("corruption", False)):
        life = replace(REAL, rates={kind: 1 / 20_000}, spares=1000)
        without, with_copies = (
            sum(outcome.redone for outcome in simulate_runs(replace(life, memory_every=every), 20)) for every in (0, 50)
        )
        assert (with_copies < without / 5) is fewer


def test_the_default_rates_are_the_published_ones():
    rates = LifetimeOptions().rates
    assert sum(rates.values()) == pytest.approx(6.5)
    interruptions = {"node": 308, "process": 56, "link": 42, "hang": 7, "corruption": 6}
    assert sum(interruptions.values()) == 419
    for kind, number in interruptions.items():
        assert rates[kind] == pytest.approx(6.5 * number / 419, abs=0.005)


def test_a_step_takes_as_long_as_in_the_plan():
    options, config = PlanOptions(nodes=2, gpus_per_node=1, link=8, mfu=0.1), compose_config(TINY)
    plan = make_plan(options, config)
    assert estimate_step(options, config) == (plan.times.step, plan.checkpoint)


def test_the_page_and_the_picture(tmp_path, capsys):
    chart = tmp_path / "chart.png"
    arguments = ["nodes=2", "gpus_per_node=1", "runs=5", "save_every=500", "steps=200000", "step_seconds=0.4"]
    main([*TINY, *arguments, f"chart={chart}"])
    page = capsys.readouterr().out
    for part in ("FAULTS PER 1,000 NODE-DAYS", "\n2.34, ", "\n6.5, ", "\n26, ", "GPU-HOURS LOST BY CAUSE", *KINDS,
                 LIMIT, "500, as configured", "best of these", "Young", "Daly", "WHAT WOULD CHANGE IT",
                 "requeue after each", "ASSUMED", "Kokolis", "Llama 3"):  # fmt: skip
        assert part in page, part
    assert page.count("\n6.5, ") == 1
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_below_the_aim_the_page_says_what_stands_in_the_way(capsys):
    main([*TINY, "nodes=2", "gpus_per_node=1", "runs=5", "steps=200000", "step_seconds=1", "node_faults=9000"])
    assert "  below 97%: node " in capsys.readouterr().out
    life = replace(REAL, rates={"hang": 1 / 2000}, steps=20_000)
    assert Runs.of(life, LifetimeOptions(runs=5)).lost("hang", "end") > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restart=now"], "restart=now must be one of in_place, requeue"),
        (["spares=-1"], "spares=-1 must be at least 0"),
        (["storage=0"], "storage=0.0 must be at least 0.001"),
        (["hangs=nan"], "hangs=nan must be at least 0"),
        (["cached_share=4"], "cached_share=4.0 must lie between 0 and 1"),
        (["job_hours=0.1"], "job_hours=0.1 must be at least 1, or 0 for no limit"),
        ([f"{name}=0" for name in KINDS.values()], "are all 0: without faults there is nothing to simulate"),
        (["spars=1"], "unknown key 'spars' (did you mean 'spares'?)"),
        (["nodes=3", "gpus_per_node=1"], "no micro_batch fits 3 ranks"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([*TINY, "nodes=2", "gpus_per_node=1", *arguments] if "nodes=3" not in arguments else [*TINY, *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_help_needs_no_torch(repo):
    asked = "import sys; sys.argv = ['x', '--help']\nfrom launch.lifetime import main\ntry: main()\nexcept SystemExit: "
    shown = subprocess.run(
        [sys.executable, "-c", asked + "print('torch' in sys.modules, 'matplotlib' in sys.modules)"],
        cwd=repo, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.stdout.endswith("False False\n") and "node_faults" in shown.stdout, shown.stderr
