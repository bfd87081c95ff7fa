"""Machines in network namespaces of this one, each behind a link of a chosen rate."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

NEEDED = ("ip", "tc", "unshare")
PREFIX = "if-test-"
LINK, MASTER = "eth0", "10.77.0.1"
# Where `ip netns exec` finds the /etc/hosts of a namespace.
ETC = Path("/etc/netns")
COUNTER = Path(f"/sys/class/net/{LINK}/statistics/tx_bytes")


def missing() -> str:
    """Why there can be no namespaces here; '' if there can."""
    if os.geteuid() != 0:
        return "network namespaces are made as root, and this is not root"
    if absent := [name for name in NEEDED if not shutil.which(name)]:
        return f"{' and '.join(absent)} of the packages iproute2 and util-linux is not installed"
    try:
        with machines(1) as (name,):
            run("ip", "netns", "exec", name, *limit_command(100))
    except OSError as error:
        return f"no network namespaces here: {error}"
    return ""


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[str]]:
    """Namespaces with an interface LINK each, 10.77.0.1 and on, on one bridge; their names.

    They are removed at the end, also after Ctrl-C and SIGTERM. Those of a process that was killed are removed first.
    Raises: OSError if the system does not let us.
    """
    remove_left()
    before = signal.signal(signal.SIGTERM, leave)
    hub, *names = (f"{PREFIX}{os.getpid()}-{part}" for part in ("hub", *range(count)))
    try:
        run("ip", "netns", "add", hub)
        run("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "hub", "up")
        for i, name in enumerate(names):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", LINK, "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", hub)
            run("ip", "-n", hub, "link", "set", f"port{i}", "master", "hub", "up")
            # Without an IPv6 address, which gloo would take for the machine's own.
            run("ip", "-n", name, "link", "set", LINK, "addrgenmode", "none")
            run("ip", "-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", LINK)
            for interface in (LINK, "lo"):
                run("ip", "-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def nodes(count: int, hosts: Callable[[int], str]) -> Iterator[list[list[str]]]:
    """Machines with the hostnames node1, node2, ... and /etc/hosts of their own; the command that runs another on each.

    hosts: a machine's /etc/hosts, by its number from 0.
    """
    with machines(count) as names:
        for number, name in enumerate(names):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(hosts(number), encoding="ascii")
        named = 'hostname "$0" && exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, f"node{number + 1}"]
            for number, name in enumerate(names)
        ]


def limit_command(mbit: float) -> list[str]:
    """The command that limits what a machine sends, run on it.  mbit: Mbit/s; 0 for no limit."""
    if not mbit:
        return ["tc", "qdisc", "replace", "dev", LINK, "root", "pfifo_fast"]
    # A packet of a virtual link has up to 64 KB. The queue is so long that none is dropped, as on a network of GPUs.
    limit = ["rate", f"{round(mbit * 1000)}kbit", "burst", "128kb", "latency", "10s"]
    return ["tc", "qdisc", "replace", "dev", LINK, "root", "tbf", *limit]


def limit(mbit: float) -> None:
    """Limit what this machine sends.  mbit: Mbit/s; 0 for no limit."""
    run(*limit_command(mbit))


def sent() -> int:
    """Bytes that this machine has sent, with their headers."""
    return int(COUNTER.read_text(encoding="ascii"))


def remove_left() -> None:
    """Remove the namespaces of processes that are gone."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{name.removeprefix(PREFIX).split('-')[0]}").exists():
            run("ip", "netns", "delete", name)
            shutil.rmtree(ETC / name, ignore_errors=True)


def run(*command: str) -> str:
    """What a command prints.  Raises: OSError with its message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


def leave(signum: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM: end as a program does, so that what was made is removed."""
    sys.exit(128 + signum)
