"""Nodes of a cluster on one machine: network namespaces on a bridge, each with its own hostname and /etc/hosts."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ETC = Path("/etc/netns")


def run(*command: str) -> None:
    """Raises: subprocess.CalledProcessError with what the command said."""
    subprocess.run(command, check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine has no namespaces for a test; '' if it has them."""
    if os.geteuid():
        return "needs root for network namespaces"
    if missing := [tool for tool in ("ip", "unshare") if not shutil.which(tool)]:
        return f"needs {' and '.join(missing)} for network namespaces"
    try:
        run("ip", "netns", "add", "iftest-probe")
        run("ip", "-n", "iftest-probe", "link", "add", "probe", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", "iftest-probe"], capture_output=True)
    return ""


@contextmanager
def nodes(count: int, hosts: Callable[[int], str]) -> Iterator[list[list[str]]]:
    """`count` nodes at 10.77.0.1, .2, ...; for each the command that runs another one on it.

    hosts: the node's /etc/hosts, by its number from 0; its hostname is node1, node2, ...
    """
    names = [f"iftest-{os.getpid()}-{number}" for number in range(count)]
    hub = f"iftest-{os.getpid()}-hub"
    try:
        run("ip", "netns", "add", hub)
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            run("ip", "netns", "add", name)
            # Made within the hub, so that it never meets an interface of the machine's own.
            run("ip", "-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", name)
            run("ip", "-n", hub, "link", "set", f"port{number}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", interface, "up")
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(hosts(number))
        named = 'hostname "$0" && exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, f"node{number + 1}"]
            for number, name in enumerate(names)
        ]
    finally:
        for name in (*names, hub):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)
