"""How the progress of long work is told: on a pseudo-terminal, in a file, by several processes, when interrupted."""

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import progress
from data.progress import Progress, duration, each
from tests.support.terminal import on_terminal, screen

ROOT = Path(__file__).resolve().parent.parent
# Of a bar on a terminal: name, percentage, bar, number, times and rate.
BAR = r"{what}: +{percent}%\|[^|]*\| {number} \[[\d:]+<[\d:?]+, +[\d.?]+ ?(\w+/s|s/ \w+){beside}\]"
TOY = """
import logging, sys, time
sys.argv[0] = "-m"
import data
from dataclasses import dataclass
from data.cli import command
from data.processes import in_processes
from data.progress import Progress, each
@dataclass
class Nothing:
    "Does nothing."
def act(args):
    ACTION
command(act, Nothing)
"""


class Clock:
    """Stands for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(progress._state, "quiet", False)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not progress._open


def bar(what: str, percent: int, number: str, beside: str = "") -> str:
    """The pattern of a bar."""
    return BAR.format(what=what, percent=percent, number=number, beside=beside)


def toy(action: str) -> list[str]:
    """The command line of a command that does what `action` says."""
    return [sys.executable, "-c", TOY.replace("ACTION", action.strip().replace("\n", "\n    "))]


def test_a_line_a_minute_and_one_at_the_end(clock, capsys):
    with Progress("embed", 10_000, "caption", "text") as embed:
        for _ in range(25):  # one in 10 s
            clock.now += 10
            embed.update(400)
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == [
        f"embed: {number:,} of 10,000 captions ({percent} %), 40 captions/s, {left} left, to text"
        for number, percent, left in (
            (2400, 24, "3 min"), (4800, 48, "2 min"), (7200, 72, "70 s"), (9600, 96, "10 s"),
        )
    ]  # fmt: skip
    assert last == "embed: 10,000 of 10,000 captions (100 %), 40 captions/s, in 4 min, to text"


def test_the_rate_of_resumed_work_is_that_of_this_start(clock, capsys):
    with Progress("run", 1000, "step", "runs/run", start=900) as run:
        clock.now += 80
        run.update(40, {"loss": "0.1234", "img/s": "8.0"})
        clock.now += 120
        run.update(60)
    assert capsys.readouterr().err.splitlines() == [
        "run: 940 of 1,000 steps (94 %), 2 s/step, 2 min left, loss 0.1234, img/s 8.0, to runs/run",
        "run: 1,000 of 1,000 steps (100 %), 2 s/step, 100 of them in 3 min, loss 0.1234, img/s 8.0, to runs/run",
    ]


def test_without_a_total_there_is_no_share_and_no_time_left(clock, capsys):
    for item in each(iter(range(123)), "listing", "file"):
        clock.now += 0.5
        assert item < 123
    line = "listing: {} files, 2 files/s"
    assert capsys.readouterr().err.splitlines() == [line.format(120), line.format(123) + ", in 62 s"]


def test_where_nothing_is_to_be_done_nothing_is_told(clock, capsys):
    assert list(each([], "listing", "file")) == []
    with Progress("embed", 10, "caption", start=10) as embed:
        clock.now += 100
        embed.update(0)
    assert capsys.readouterr() == ("", "")


def test_what_fails_or_is_stopped_tells_the_error_alone(clock, capsys, monkeypatch):
    with pytest.raises(ValueError, match="wrong"), Progress("embed", 10, "caption") as embed:
        clock.now += 1
        embed.update()
        raise ValueError("wrong")
    with Progress("embed", 10, "caption") as embed:
        embed.update()
        monkeypatch.setattr(progress, "interrupted", lambda: True)
    assert capsys.readouterr() == ("", "")


def tell_something() -> None:
    """In a worker it tells nothing, however many lines there could be."""
    with Progress("embed", 2, "caption") as embed:
        embed.update(2)
        embed.write("a fault")


def test_one_of_several_processes_tells(capfd, monkeypatch):
    tell_something()
    assert capfd.readouterr().err.startswith("embed: 2 of 2 captions (100 %)")
    worker = multiprocessing.get_context("fork").Process(target=tell_something)
    worker.start()
    worker.join()
    assert capfd.readouterr() == ("a fault\n", ""), "a loader worker, or one of in_processes"
    for name in ("SLURM_PROCID", "RANK"):
        monkeypatch.setenv(name, "1")
        tell_something()
        assert capfd.readouterr() == ("a fault\n", ""), name
    monkeypatch.setenv("RANK", "0")  # by the second task of Slurm
    tell_something()
    assert capfd.readouterr().err


def test_times_in_words():
    shown = {15.4: "15 s", 80: "80 s", 100: "2 min", 3570: "1 h 0 min", 12_000: "3 h 20 min", 187_000: "2 d 4 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown


RESUMED = """
with Progress("scenes", 3, "scene", "demo/shards", start=2) as scenes:
    logging.getLogger("data").warning("one is odd")
    scenes.update()
print("3 scenes")
"""


def test_a_command_tells_the_same_on_a_terminal_in_a_file_and_quietly():
    terminal = on_terminal(toy(RESUMED))
    assert terminal.end() == 0
    warning, shown, result, cursor = terminal.screen()
    assert warning == "one is odd"
    assert re.fullmatch(bar("scenes", 100, "3/3") + " to demo/shards", shown) and (result, cursor) == ("3 scenes", "")
    assert "\r" in terminal.said.replace("\r\n", ""), "it was drawn over"
    line = (
        r"one is odd\nscenes: 3 of 3 scenes \(100 %\), [\d,.]+ (scenes/s|s/scene), 1 of them in \d+ s, to demo/shards\n"
    )
    for quiet, told in ([], line), (["-q"], r"one is odd\n"):
        done = subprocess.run([*toy(RESUMED), *quiet], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "3 scenes\n") and re.fullmatch(told, done.stderr), done.stderr


LINES = """
with Progress("work", 4, "step", "runs/{x}") as work:
    for step in range(4):
        work.update(1, {"loss": f"0.{step}"})
        work.write(f"step {step} is noted")
        logging.warning("step %d is logged", step)
logging.warning("all is logged")
for _ in each(iter("ab"), "letters", "letter"):
    pass
list(in_processes(lambda item: [item for item in each([item], "inside", "item")], [1, 2, 3], 2, "item", "shared"))
print("the result")
"""


def test_lines_stand_above_the_bar_and_bars_below_one_another():
    terminal = on_terminal(toy(LINES))
    assert terminal.end() == 0, terminal.said
    *noted, work, logged, letters, shared, result, cursor = terminal.screen()
    assert noted == [f"step {step} is {done}" for step in range(4) for done in ("noted", "logged")]
    assert logged == "all is logged"
    assert re.fullmatch(bar("work", 100, "4/4", ", loss=0.3") + r" to runs/\{x\}", work), work
    assert re.fullmatch(r"letters: 2 letter \[[\d:]+, +[\d.?]+ letter/s\]", letters), letters
    assert re.fullmatch(bar("shared", 100, "3/3"), shared) and "inside" not in terminal.said
    assert (result, cursor) == ("the result", "")


@pytest.mark.parametrize(
    "action",
    [
        'for item in each(range(4), "work", "step"):\n    if item == 2: raise ValueError("wrong")',
        'work = Progress("work", 4, "step")\nwork.update(2)\nraise ValueError("wrong")',  # which nothing has closed
    ],
)
def test_an_error_stands_in_a_line_of_its_own(action):
    terminal = on_terminal(toy(action))
    assert terminal.end() == 2
    work, error, cursor = terminal.screen()
    assert re.fullmatch(bar("work", 50, "2/4"), work) and (error, cursor) == ("error: wrong", "")


def test_a_traceback_begins_in_a_line_of_its_own():
    terminal = on_terminal(toy('work = Progress("work", 4, "step")\nwork.update(2)\nraise TypeError("wrong")'))
    assert terminal.end() == 1
    work, begin, *_, error, cursor = terminal.screen()
    assert re.fullmatch(bar("work", 50, "2/4"), work) and begin.startswith("Traceback")
    assert (error, cursor) == ("TypeError: wrong", "")


HANGS = """
from train.faults.watchdog import Watchdog
work = Progress("work", 4, "step")
work.update(2)
Watchdog(0, 0.05)
time.sleep(600)
"""


def test_the_stacks_of_a_hang_begin_in_a_line_of_their_own():
    terminal = on_terminal(toy(HANGS))
    assert terminal.end() == 1
    work, begin, *_ = terminal.screen()
    assert re.fullmatch(bar("work", 50, "2/4"), work) and begin.startswith("rank 0: HANGS, no progress for ")


STUCK = """
def late(item):
    if item == 2: print("stuck", flush=True); time.sleep(SECONDS)
    return item
for _ in WORK: pass
"""


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        ('map(late, each(range(4), "work", "step", "out"))', 600),
        ('in_processes(late, range(4), 2, "step", "work", "out")', 2),  # whose workers end what they have begun
    ],
)
def test_ctrl_c_leaves_the_terminal_clean(work, seconds):
    terminal = on_terminal(toy(STUCK.replace("WORK", work).replace("SECONDS", str(seconds))))
    terminal.wait_for("stuck\r\n")
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    shown = [line for line in terminal.screen() if "work: " not in line or "stuck" not in line]
    assert terminal.said.endswith("stopped by Ctrl-C\r\n") and "Traceback" not in terminal.said
    assert shown[-2:] == ["stopped by Ctrl-C", ""] and terminal.said.count("stopped") == 1
    assert "work: " not in terminal.said.partition("^C")[2], "nothing is drawn over what was said"


def test_a_screen_is_drawn_as_a_terminal_does():
    assert screen("abc\rx\r\ncd\x1b[A\r12345\r\n") == ["12345", "cd"]
    assert screen("a: 10%\r          \ra line\r\na: 20%\r\n") == ["a line", "a: 20%", ""]


OF_LIBRARIES = """
import os
from data.quiet import quiet_libraries
quiet_libraries()
print(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
"""


def test_bars_of_libraries_are_shown_where_ours_are(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)  # as another test may leave it
    command = [sys.executable, "-c", OF_LIBRARIES]
    terminal = on_terminal(command)
    assert terminal.end() == 0 and terminal.screen() == ["None", ""]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "1\n"
