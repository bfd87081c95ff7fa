"""Lists of what a run cannot rely on, samples and nodes; they are short, and a failure to write one stops no run."""

import json
import logging
import os
import socket
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from data.storage.atomic import atomic_file

logger = logging.getLogger(__name__)

MAX_NAME_LENGTH = 300
# The nodes of a run, what failed there and how often: {node: {kind: {"times": 2, "last": time, "what": text}}}.
NODES = "nodes.json"
KINDS = ("preflight", "straggler", "corruption", "death")
# Of which one is enough: it is counted where the ranks are sure which one of them is wrong, and a wrong number may go
# into a checkpoint, where a slow or a dead node only costs time.
ENOUGH_ALONE = "corruption"


class Quarantine:
    """Appends to run_dir/quarantine/rank_NNNNN.jsonl, one line a sample: step, sample, reason.

    limit: most lines in the file, those of earlier starts included; further samples are only counted in the metrics.
    If the file cannot be written, one warning says so and the list ends: a run needs the counts, not the list.
    """

    def __init__(self, run_dir: Path, rank: int, limit: int = 1000) -> None:
        self.path, self.limit = run_dir / "quarantine" / f"rank_{rank:05d}.jsonl", limit
        self._lines_left: int | None = None  # unknown before the first bad sample: a run without any reads no disk

    def add(self, step: int, bad: list[tuple[str, str]]) -> None:
        """List the (sample, reason) pairs of a micro batch."""
        if not bad or self._lines_left == 0:
            return
        try:
            if self._lines_left is None:
                self._lines_left = max(self.limit - self._count_lines(), 0)
            listed = bad[: self._lines_left]
            self._append(step, listed)
            self._lines_left -= len(listed)
            if listed and not self._lines_left:
                logger.warning("%s has its %d lines: bad samples are only counted from here on", self.path, self.limit)
        except OSError as error:
            logger.warning("bad samples are only counted from here on: %s cannot be written (%s)", self.path, error)
            self._lines_left = 0

    def _count_lines(self) -> int:
        """Whole lines in the file; an incomplete last line, left by a crash, is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.path, end)
        return content.count(b"\n")

    def _append(self, step: int, bad: list[tuple[str, str]]) -> None:
        lines = [json.dumps({"step": step, "sample": name[:MAX_NAME_LENGTH], "reason": why}) for name, why in bad]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def node_name() -> str:
    """The name of this node, by which Slurm knows it if it runs here."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_node_fault(run_dir: Path, node: str, kind: str, what: str) -> None:
    """Count a fault of a node in RUN_DIR/nodes.json; only the first rank or the batch script calls it.

    node: as node_name() says there.  kind: of KINDS.  what: one line, kept of the last fault of its kind.
    """
    assert kind in KINDS, kind
    path = run_dir / NODES
    try:
        if not run_dir.is_dir():  # as when its disk is gone: nothing belongs on the disk below its mount point
            raise FileNotFoundError(f"there is no folder '{run_dir}'")
        nodes = read_node_faults(run_dir)
        faults = nodes.setdefault(node, {})
        times = faults.get(kind, {}).get("times", 0) + 1
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        faults[kind] = {"times": times, "last": now, "what": what[:MAX_NAME_LENGTH]}
        with atomic_file(path) as aside:
            aside.write_text(json.dumps(nodes, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        logger.warning("the fault of %s (%s: %s) is not recorded: %s", node, kind, what, error)


def read_node_faults(run_dir: Path) -> dict[str, dict[str, dict]]:
    """What RUN_DIR/nodes.json says, by node and kind; empty without it.

    Raises: ValueError if it is no such file; OSError if it cannot be read.
    """
    path = run_dir / NODES
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
        assert all(isinstance(fault["times"], int) for faults in nodes.values() for fault in faults.values())
    except FileNotFoundError:
        return {}
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is no list of nodes ({error!r}): repair it, or delete it to forget them") from None
    return nodes


def fault_counts(run_dir: Path) -> Counter[str]:
    """How often each node has failed in this run, whatever the kind.

    Raises: ValueError, OSError as read_node_faults.
    """
    nodes = read_node_faults(run_dir)
    return Counter({node: sum(fault["times"] for fault in faults.values()) for node, faults in nodes.items()})


def bad_nodes(run_dir: Path, most: int) -> dict[str, str]:
    """The nodes with at least so many faults, or one of ENOUGH_ALONE, and in words what they were; none for 0.

    Raises: ValueError, OSError as read_node_faults.
    """
    if not most:
        return {}
    nodes, counts = read_node_faults(run_dir), fault_counts(run_dir)
    return {
        node: ", ".join(f"{kind} {fault['times']} x ({fault['what']})" for kind, fault in faults.items())
        for node, faults in nodes.items()
        if counts[node] >= most or ENOUGH_ALONE in faults
    }
