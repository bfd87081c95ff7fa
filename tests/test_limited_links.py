"""Ranks behind limited links: what they send is what the plan says, and nothing of them is left."""

import signal
import subprocess
import sys

import pytest

from tests.benchmarks.limited_links import steps_of
from tests.support.namespaces import PREFIX, missing, run

HOLD = """
import signal, time
from tests.support.namespaces import machines

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
with machines(2):
    print('made', flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def namespaces():
    if why := missing():
        pytest.skip(why)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_namespaces_are_removed_however_the_process_ends(repo, number):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    own = f"{PREFIX}{process.pid}-"
    assert process.stdout.readline() == b"made\n"
    assert run("ip", "netns", "list").count(own) == 3
    process.send_signal(number)
    process.wait(20)
    if number == signal.SIGKILL:  # then the next one removes them
        assert missing() == ""
    assert own not in run("ip", "netns", "list")


@pytest.mark.slow
def test_the_engine_sends_what_the_plan_says_and_hands_it_over_inside_the_backward():
    found = steps_of(ranks=2, ratios=[0, 0.78], compute=0.3, steps=1)
    for way in ("behind", "inside"):
        assert sum(found["sizes"][way]) == found["trained"]
        for sent in found["engine"][way]:
            assert 1 <= sent / found["planned"] < 1.05
    assert found["moments"]["behind"] == [1.0] and len(found["sizes"]["inside"]) > 20
    early = [size for size, at in zip(found["sizes"]["inside"], found["moments"]["inside"], strict=True) if at < 0.8]
    assert sum(early) > 0.5 * found["trained"]
