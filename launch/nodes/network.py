"""The network's rate between ranks, and how far their clocks are apart; all are collective calls."""

import time

import torch
import torch.distributed as dist

from train.faults.route import gloo_reaches_all

ROUNDS = 5


def clock_offsets() -> list[float]:
    """The clocks of all ranks, in seconds, read right after a barrier."""
    dist.barrier()
    clocks: list = [None] * dist.get_world_size()
    dist.all_gather_object(clocks, time.time())
    return clocks


def meet_by_gloo() -> None:
    """Make a group of gloo and use it once, as a training has for its ranks' consent, with NCCL too.

    Raises: ConnectionError if a node cannot be reached so.
    """
    with gloo_reaches_all():
        dist.barrier(group=dist.new_group(backend="gloo"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce_rate(device: torch.device, megabytes: int) -> float:
    """Bus bandwidth of an all-reduce in bytes/s, as nccl-tests define it: 2 (n - 1) / n of its bytes over its time.

    megabytes: MiB of the message.
    """
    ranks, message = dist.get_world_size(), torch.ones(megabytes * 2**18, device=device)
    dist.all_reduce(message)
    _synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(message)
    _synchronize(device)
    seconds = (time.perf_counter() - start) / ROUNDS
    return 2 * (ranks - 1) / ranks * message.nbytes / seconds


def tournament(players: list[int]) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs, so that everyone meets everyone else once; by the circle method."""
    ring: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def pair_rates(device: torch.device, megabytes: int, names: list[str]) -> dict[tuple[str, str], float]:
    """Bytes/s each way between the first ranks of every two nodes; empty except on rank 0.

    megabytes: MiB of a message.  names: of each rank's node.
    """
    first = [names.index(name) for name in dict.fromkeys(names)]
    rank, mine = dist.get_rank(), {}
    sent = torch.ones(megabytes * 2**18, device=device)
    received = torch.empty_like(sent)
    for pairs in tournament(first):
        partner = next((a + b - rank for a, b in pairs if rank in (a, b)), None)
        dist.barrier()
        if partner is None:
            continue
        for warm_up in (True, False):
            start = time.perf_counter()
            both_ways = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
            for work in dist.batch_isend_irecv(both_ways):
                work.wait()
            _synchronize(device)
            if not warm_up:
                mine[partner] = sent.nbytes / (time.perf_counter() - start)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if rank:
        return {}
    return {(names[a], names[b]): min(rate, everyone[b][a]) for a in first for b, rate in everyone[a].items() if a < b}
