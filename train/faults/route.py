"""The network interface on which gloo meets the other ranks: it would take the one of this node's hostname.

Debian's /etc/hosts gives a node's hostname the address 127.0.1.1, which no other node can reach.
"""

import os
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import psutil

THIS_NODE = ("localhost", "127.0.0.1", "::1")
# An address of TEST-NET-1 (RFC 5737), which is nowhere: the way there is the default route. Nothing is sent.
ANYWHERE = "192.0.2.1"
NAME_IT = "name the interface that the nodes share, GLOO_SOCKET_IFNAME=eth0 for one"


def choose_gloo_interface(environment: MutableMapping[str, str] = os.environ) -> str:
    """Set GLOO_SOCKET_IFNAME to the interface on the way to MASTER_ADDR, unless it is set; on one node to loopback.

    NCCL_SOCKET_IFNAME is left as it is: NCCL does not ask for the hostname and avoids loopback by itself, and the
    network of MASTER_ADDR may be slower than those that it finds.
    Returns the line to tell, '' on one node.
    Raises: ConnectionError if MASTER_ADDR has no address or no route, or the interface is not to be known.
    """
    if environment.get("GLOO_SOCKET_IFNAME"):
        return f"gloo meets over {environment['GLOO_SOCKET_IFNAME']}, as GLOO_SOCKET_IFNAME says"
    master, ranks = environment["MASTER_ADDR"], environment["WORLD_SIZE"]
    if master in THIS_NODE or environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE")) == ranks:
        environment["GLOO_SOCKET_IFNAME"] = _interface("127.0.0.1")
        return ""
    address, why = _address_towards(master), f"on the way to MASTER_ADDR={master}"
    if address.startswith("127."):
        address, why = _address_of_this_node(master)
    environment["GLOO_SOCKET_IFNAME"] = _interface(address)
    return f"gloo meets over {environment['GLOO_SOCKET_IFNAME']} ({address}), {why}"


def _address_towards(host: str) -> str:
    """This node's address on the way to a host.  Raises: ConnectionError."""
    try:
        family, kind, _, _, to = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unused:
            unused.connect(to)  # of a datagram socket it only chooses the route
            return str(unused.getsockname()[0])
    except OSError as error:
        raise ConnectionError(
            f"{socket.gethostname()} finds no way to MASTER_ADDR={host} ({error.strerror or error}): give the first "
            "node's address in MASTER_ADDR (--master_addr), or repair the names or routes of this node"
        ) from None


def _address_of_this_node(master: str) -> tuple[str, str]:
    """The address by which other nodes know this one, the master, whose name is loopback here, and why this one."""
    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET and not a.address.startswith("127.")]
        for name, found in psutil.net_if_addrs().items()
    }
    own = [found[0] for found in addresses.values() if found]
    if len(own) == 1:
        return own[0], f"the only interface, MASTER_ADDR={master} being loopback on its own node"
    try:
        return _address_towards(ANYWHERE), f"the default route, MASTER_ADDR={master} being loopback on its own node"
    except ConnectionError:
        raise ConnectionError(
            f"MASTER_ADDR={master} is a loopback address on its own node, {socket.gethostname()}, which has "
            f"{len(own)} interfaces and no default route: {NAME_IT}, or give that node's address in MASTER_ADDR"
        ) from None


def _interface(address: str) -> str:
    """The interface that has an address of this node.  Raises: ConnectionError."""
    for name, found in psutil.net_if_addrs().items():
        if address in (a.address.partition("%")[0] for a in found):
            return name
    if address.startswith("127."):
        return _interface("127.0.0.1")  # all of 127.0.0.0/8 is loopback
    raise ConnectionError(f"no interface of {socket.gethostname()} has its address {address}: {NAME_IT}")


@contextmanager
def gloo_reaches_all() -> Iterator[None]:
    """Inside the block a group of gloo is made.  Raises: ConnectionError if it cannot reach all ranks."""
    try:
        yield
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise ConnectionError(
            f"gloo on {socket.gethostname()} cannot reach the other ranks over "
            f"{os.environ.get('GLOO_SOCKET_IFNAME')} ({str(error).rpartition('] ')[2]}): {NAME_IT}, or open the "
            "firewall between them"
        ) from None
