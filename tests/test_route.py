"""gloo meets by the interface that leads to the other nodes, whatever the hostname resolves to."""

import os
import subprocess
import sys

import pytest

from tests.support.namespaces import missing, nodes
from tests.support.trainings import SMALL, make_data
from train.faults.route import choose_gloo_interface

TWO_NODES = {"WORLD_SIZE": "16", "LOCAL_SIZE": "8", "MASTER_PORT": "29500"}
CHOOSE = "from train.faults.route import choose_gloo_interface as c; print(c())"
WHY_NOT = missing()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def as_debian_has_it(number: int) -> str:
    """A node's own name is loopback; only the other one's leads out."""
    return f"127.0.0.1 localhost\n127.0.1.1 node{number + 1}\n10.77.0.{2 - number} node{2 - number}\n"


def test_one_node_meets_on_loopback_and_a_given_interface_stays():
    one = {"WORLD_SIZE": "8", "LOCAL_SIZE": "8", "MASTER_ADDR": "somewhere"}
    assert choose_gloo_interface(one) == "" and one["GLOO_SOCKET_IFNAME"] == "lo"
    given = TWO_NODES | {"MASTER_ADDR": "somewhere", "GLOO_SOCKET_IFNAME": "ib0"}
    assert "over ib0" in choose_gloo_interface(given) and given["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_master_without_an_address_is_named():
    with pytest.raises(ConnectionError, match=r"no way to MASTER_ADDR=no\.such\.node\.invalid \(.*give the first node"):
        choose_gloo_interface(TWO_NODES | {"MASTER_ADDR": "no.such.node.invalid"})


@needs_namespaces
def test_the_interface_is_that_of_the_route(repo):
    def choose(node: list[str], master: str) -> str:
        environment = os.environ | TWO_NODES | {"MASTER_ADDR": master, "PYTHONPATH": str(repo)}
        done = subprocess.run([*node, sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    with nodes(2, as_debian_has_it) as (first, second):
        for node, address in ((first, "10.77.0.1"), (second, "10.77.0.2")):
            assert choose(node, "10.77.0.1") == f"gloo meets over eth0 ({address}), on the way to MASTER_ADDR=10.77.0.1"
        assert choose(second, "node1") == "gloo meets over eth0 (10.77.0.2), on the way to MASTER_ADDR=node1"
        assert "eth0 (10.77.0.1), the only interface, MASTER_ADDR=node1 being loopback" in choose(first, "node1")
        # A second interface: nothing says which one the other node means, until there is a default route.
        for command in ("link add more type bridge", "address add 10.78.0.1/24 dev more", "link set more up"):
            subprocess.run([*first, "ip", *command.split()], check=True)
        assert "has 2 interfaces and no default route: name the interface" in choose(first, "node1")
        subprocess.run([*first, "ip", "route", "add", "default", "via", "10.77.0.2"], check=True)
        assert "eth0 (10.77.0.1), the default route, MASTER_ADDR=node1 being loopback" in choose(first, "node1")


@pytest.mark.slow
@needs_namespaces
def test_two_nodes_whose_hostnames_are_loopback_pass_the_preflight(repo, tmp_path):
    data = make_data(tmp_path / "data")
    given = [*SMALL, "test_mb=1", "step_seconds=60", f"run_dir={tmp_path / 'run'}", f"data.shards={data / 'shards'}"]
    program = [sys.executable, "-m", "launch.preflight", *given, f"data.text={data / 'text'}"]
    with nodes(2, as_debian_has_it) as commands:
        started = []
        for rank, node in enumerate(commands):
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
            environment = os.environ | own | {"MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen([*node, *program], cwd=repo, env=environment, **pipes))
        said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "2 ranks on 2 nodes" in said[0] and "every node is ready" in said[0]
    for number, text in enumerate(said):
        assert f"gloo meets over eth0 (10.77.0.{number + 1})" in text
