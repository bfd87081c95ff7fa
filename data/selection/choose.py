"""Choosing: the rules are evaluated once over the fields of all samples, shard by shard, in processes."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from data.checks import count, one_line
from data.processes import in_processes
from data.selection.drop import DropList, read_list, row_hashes
from data.selection.fields import KEY, NUMBER, TEXT, TRUTH, kind_of, read_fields, state_of, unknown_field
from data.selection.rules import Rules
from data.selection.stored import Chosen
from data.selection.where import Where
from data.storage.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

# Which fields there are, and of what kind, is found in the first samples of some shards, spread evenly.
PEEK_SHARDS, PEEK_SAMPLES = 16, 250
# Seconds after which what is done is saved, so that an interrupted run goes on from there.
SAVE_SECONDS = 60.0
# Makes the hash of a key that holds a sample apart another than that of a list.
HELD_APART = b"validation"


@dataclass(slots=True)
class Fields:
    """The fields of some samples.  kinds: of each field, as most samples have it.  having: samples that have it."""

    samples: int = 0
    shards: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    having: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """A line for each field: its kind and how many of the samples have it."""
        width = max(map(len, self.kinds), default=0)
        return [f"fields, by {count(self.samples, 'sample')} of {count(self.shards, 'shard')}:"] + [
            f"  {name:<{width}}  {kind or 'never given':<13}  {self.having[name]:,} of {self.samples:,}"
            for name, kind in self.kinds.items()
        ]


def look_at_fields(shards: Sequence[Shard], workers: int, names: Sequence[str] | None = None) -> Fields:
    """The fields of the first samples of some shards, spread evenly.

    names: look at these fields alone, in all samples of all shards.
    Raises: ValueError if a shard's fields can't be read; OSError.
    """
    filled = [shard for shard in shards if shard.count]
    if names is None and filled:
        filled = [filled[i] for i in np.unique(np.arange(PEEK_SHARDS) * len(filled) // PEEK_SHARDS)]
    found, votes = Fields(shards=len(filled)), dict[str, Counter[str]]()
    for samples, counts in in_processes(partial(_peek, names), filled, workers, "shard", "fields"):
        found.samples += samples
        for name, (kind, having) in counts.items():
            votes.setdefault(name, Counter())[kind] += having
    for name, kinds in votes.items():
        known = {kind: having for kind, having in kinds.items() if kind}
        found.kinds[name] = max(sorted(known), key=lambda kind: known[kind]) if known else ""
        found.having[name] = kinds[found.kinds[name]]
    return found


def _peek(names: Sequence[str] | None, shard: Shard) -> tuple[int, dict[str, tuple[str, int]]]:
    table = read_fields(shard, names, PEEK_SAMPLES if names is None else None)
    return table.num_rows, {
        name: (kind_of(table[name].type), table.num_rows - table[name].null_count) for name in table.column_names
    }


@dataclass(slots=True)
class Plan:
    """Rules that are ready to be applied.  lists: with the field of the shards that each is compared with.

    kinds: of the fields that are needed.
    """

    where: Where | None
    lists: list[tuple[DropList, str]]
    share: float
    kinds: dict[str, str]

    def texts(self) -> list[str]:
        """The rules in words, in the order in which they are applied."""
        texts = [f"where {' '.join(self.where.text.split())}"] if self.where else []
        texts += [f"drop {drop.name} by {drop.field}" for drop, _ in self.lists]
        return texts + ([f"validation share {self.share:g}"] if self.share else [])


def make_plan(rules: Rules, fields: Fields) -> Plan:
    """Read the lists, and check the rules against the fields that there are.

    Raises: ValueError if there is no sample, for a field that none has, or that is compared with a value of another
    kind; OSError.
    """
    if not fields.samples:
        raise ValueError("the shards hold no samples, so there are none to choose from")
    where = Where(rules.where) if rules.where.strip() else None
    for name in sorted(where.fields) if where else ():
        if name not in fields.kinds:
            raise ValueError(f"where={rules.where}: {_in_those(fields)}: {unknown_field(name, fields.kinds)}")
    if where:
        where.check_kinds(fields.kinds)
    by_lower = {name.lower(): name for name in reversed(list(fields.kinds))}
    lists = []
    for location in rules.drop:
        drop = read_list(location)
        if drop.field not in by_lower:
            unknown = unknown_field(drop.field, fields.kinds)
            raise ValueError(f"drop={location} lists values of {drop.field}, but {_in_those(fields)}: {unknown}")
        lists.append((drop, by_lower[drop.field]))
    names = {KEY, *(where.fields if where else ()), *(name for _, name in lists)}
    return Plan(where, lists, rules.share, {name: fields.kinds[name] for name in sorted(names)})


def _in_those(fields: Fields) -> str:
    return f"of {count(fields.samples, 'sample')} in {count(fields.shards, 'shard')}"


def choose_all(
    shards: Sequence[Shard],
    plan: Plan,
    workers: int,
    done: dict[str, Chosen],
    save: Callable[[dict[str, Chosen]], None],
    out: str = "",
) -> list[Chosen]:
    """Apply the rules to all shards, in their order.

    done: what an interrupted run has done, by the names of the shards.  save: keeps what is done so far; called now and
    then, and if it ends before the last shard.  out: where the selection will be, to tell it.
    Raises: ValueError if a shard's fields can't be read; OSError.
    """
    todo, saved = [shard for shard in shards if shard.name not in done], time.monotonic()
    found = in_processes(partial(choose, plan), todo, workers, "shard", "choose", out, len(shards) - len(todo))
    try:
        for shard, chosen in zip(todo, found, strict=True):
            done[shard.name] = chosen
            if time.monotonic() - saved > SAVE_SECONDS:
                save(done)
                saved = time.monotonic()
    except BaseException:
        save(done)
        raise
    return [done[shard.name] for shard in shards]


def choose(plan: Plan, shard: Shard) -> Chosen:
    """Apply the rules to a shard."""
    state = state_of(shard)
    taken, took, missing = apply(plan, with_kinds(read_fields(shard, plan.kinds), plan.kinds))
    held = taken == len(took) if plan.share else np.zeros(len(taken), bool)
    return replace(Chosen.of(taken == 0, held, took, missing), state=state)


def apply(plan: Plan, table: "pa.Table") -> tuple[np.ndarray, list[int], list[int]]:
    """Apply the rules, one after the other, each to what those before have left.

    table: has the fields of the plan.
    Returns: for each row the number of the rule that took it, from 1, or 0 if it is chosen; took and missing of Chosen.
    """
    taken = np.zeros(table.num_rows, np.int32)
    took, missing = list[int](), list[int]()

    def take(hit: np.ndarray, unknown: np.ndarray) -> None:
        left = taken == 0
        took.append(int((left & hit).sum()))
        missing.append(int((left & unknown).sum()))
        taken[left & hit] = len(took)

    if plan.where:
        take(*outcome(plan.where, table))
    for drop, name in plan.lists:
        unknown = _mask(table[name].is_null())
        take(drop.hits(table[name]) & ~unknown, unknown)
    if plan.share:
        take(row_hashes(table[KEY], HELD_APART) / 2.0**64 < plan.share, np.zeros(len(taken), bool))
    return taken, took, missing


def outcome(where: Where, table: "pa.Table") -> tuple[np.ndarray, np.ndarray]:
    """Which rows do not meet an expression, and of which of them a missing field decides: bool [n] each."""
    found = where.evaluate(table)
    return ~_mask(found.fill_null(False)), _mask(found.is_null())


def _mask(column: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    mask: np.ndarray = array.to_numpy(zero_copy_only=False).astype(bool)
    return mask


def with_kinds(table: "pa.Table", kinds: dict[str, str]) -> "pa.Table":
    """The table with these fields, each of its kind: one that is absent here, or of another kind, is missing.

    Raises: ValueError if a field that was taken to have no values has some.
    """
    import pyarrow as pa

    types = {NUMBER: pa.float64(), TEXT: pa.string(), TRUTH: pa.bool_(), "": pa.null()}
    columns = {}
    for name, kind in kinds.items():
        here = table[name] if name in table.column_names else None
        if here is not None and not kind and (found := kind_of(here.type)):
            key = table[KEY][int(_mask(here.is_valid()).argmax())]
            raise ValueError(
                f"sample {one_line(str(key))} has a {found} as {one_line(name)}, which none of the first samples has: "
                "choose by `python -m data.index`, which looks at all samples then"
            )
        fits = here is not None and kind_of(here.type) == kind
        columns[name] = here if fits else pa.nulls(table.num_rows, types[kind])
    return pa.table(columns)
