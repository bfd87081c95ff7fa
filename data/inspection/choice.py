"""What rules choose of the shards that are looked at, and the values of the fields they choose by."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.checks import count
from data.processes import in_processes
from data.selection.choose import Fields, Plan, apply, look_at_fields, make_plan, outcome, with_kinds
from data.selection.fields import KEY, NUMBER, TEXT, TRUTH, read_fields
from data.selection.rules import Rules
from data.selection.stored import Receipt, Rule
from data.selection.where import Threshold, Where, reference
from data.storage.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

# Fields of numbers, and of texts, that are shown; the values of a text that is one, such as a licence.
MAX_FIELDS, MAX_VALUES = 24, 24
# Distributions are of so many samples, spread evenly; what the rules take is counted of all.
MAX_ROWS = 200_000


class Part(NamedTuple):
    """A condition of `where`: how many samples fail it, how many of them for a missing field, and how many it alone."""

    text: str
    fails: int
    missing: int
    alone: int


class Values(NamedTuple):
    """Of some samples.  taken: the rule that took each, from 1, or 0: int32 [n].  numbers: float64 [n], NaN: missing.

    numbers: of fields and of what `where` compares, each by the expression that names it.
    """

    taken: np.ndarray
    numbers: dict[str, np.ndarray]


@dataclass(slots=True)
class Choice:
    """What the rules choose of the shards looked at.

    problem: why the fields can't be read, or ''.  shards: how many were looked at.  receipt: of all their samples.
    texts: of each label how many samples have which value.
    values: of up to MAX_ROWS samples.  looked_at: of the samples whose pictures are looked at, in their order.
    """

    rules: Rules
    problem: str = ""
    shards: int = 0
    receipt: Receipt = field(default_factory=lambda: Receipt(0))
    parts: list[Part] = field(default_factory=list)
    thresholds: list[Threshold] = field(default_factory=list)
    values: Values = field(default_factory=lambda: Values(np.zeros(0, np.int32), {}))
    looked_at: Values = field(default_factory=lambda: Values(np.zeros(0, np.int32), {}))
    texts: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """The number of the rule that holds samples apart, or 0."""
        return len(self.receipt.rules) if self.rules.share else 0

    def left_out(self, taken: np.ndarray) -> np.ndarray:
        """Which samples `where` or a list took: bool [n]."""
        return (taken > 0) & (taken != self.held) if self.held else taken > 0

    def lines(self) -> list[str]:
        """What is printed: what each rule takes, and each condition of several."""
        if self.problem:
            return [f"the fields of the samples can't be read: {self.problem}"]
        if not self.rules:
            return []
        lines = self.receipt.lines() if self.receipt.samples else []
        if len(self.parts) > 1:
            lines += [f"{part.text}: {part.fails:,} fail it, {part.alone:,} it alone" for part in self.parts]
        return lines


class _Job(NamedTuple):
    """A shard to look at.  rows: whose pictures are looked at.  start: its first sample among those of all jobs."""

    shard: Shard
    rows: list[int]
    start: int


@dataclass(slots=True)
class _Found:
    samples: int
    took: list[int]
    missing: list[int]
    parts: np.ndarray
    values: Values
    looked_at: Values
    texts: dict[str, "Counter[str] | None"]


def look_at_choice(shards: Sequence[Shard], rows: Mapping[int, list[int]], rules: Rules, workers: int) -> Choice:
    """Apply the rules to all samples of some shards.

    rows: by shard, those whose pictures are looked at.
    Raises: ValueError if the rules name an unknown field, or there are rules and the fields can't be read; OSError.
    """
    chosen = [shards[number] for number in rows]
    try:
        fields = look_at_fields(chosen, workers)
        plan = make_plan(rules, fields)
        names = _shown(fields, plan)
        counts = [shard.count for shard in chosen]
        starts = np.cumsum([0, *counts]).tolist()
        jobs = [_Job(*job) for job in zip(chosen, rows.values(), starts, strict=False)]
        look = partial(_look, plan, names, math.ceil(max(starts[-1], 1) / MAX_ROWS))
        found = list(in_processes(look, jobs, workers, "shard", "choose"))
    except ValueError as error:
        if rules:
            raise
        return Choice(rules, problem=str(error))
    if not found:
        return Choice(rules, problem="there are no samples")
    took, missing = (np.sum([getattr(part, name) for part in found], 0).tolist() for name in ("took", "missing"))
    receipt = Receipt(starts[-1], [Rule(*rule) for rule in zip(plan.texts(), took, missing, strict=True)])
    receipt.held = took[-1] if rules.share else 0
    receipt.chosen = receipt.samples - int(sum(took))
    where = plan.where.parts() if plan.where else []
    sums = np.sum([part.parts for part in found], 0).tolist()
    return Choice(
        rules, "", len(chosen), receipt,
        [Part(part.text, *numbers) for part, numbers in zip(where, sums, strict=True)],
        plan.where.thresholds() if plan.where else [], _joined([part.values for part in found]),
        _joined([part.looked_at for part in found]), _counted([part.texts for part in found]),
    )  # fmt: skip


def _shown(fields: Fields, plan: Plan) -> dict[str, str]:
    """The kinds of the fields that are read: those of the plan, and the most frequent of each kind."""
    ranked = sorted(fields.kinds, key=lambda name: -fields.having[name])
    shown = dict(plan.kinds)
    for kinds in ((NUMBER,), (TEXT, TRUTH)):
        shown |= {name: fields.kinds[name] for name in [n for n in ranked if fields.kinds[n] in kinds][:MAX_FIELDS]}
    return shown


def _look(plan: Plan, kinds: dict[str, str], every: int, job: _Job) -> _Found:
    table = with_kinds(read_fields(job.shard, kinds), kinds)
    taken, took, missing = apply(plan, table)
    outcomes = [outcome(part, table) for part in (plan.where.parts() if plan.where else [])]
    fails = np.array([fail for fail, _ in outcomes], bool).reshape(len(outcomes), table.num_rows)
    alone = fails & (fails.sum(0) == 1)
    parts = np.array([[f.sum(), u.sum(), a.sum()] for f, (_, u), a in zip(fails, outcomes, alone, strict=True)])
    spread = np.arange(-job.start % every, table.num_rows, every)
    texts = {name: _values_of(table[name], kinds[name]) for name in kinds if kinds[name] in (TEXT, TRUTH)}
    terms = [threshold.of for threshold in plan.where.thresholds()] if plan.where else []
    numbers = {reference(name): _numbers(table[name]) for name in kinds if kinds[name] == NUMBER}
    numbers |= {term: _numbers(Where(term).numbers(table)) for term in terms if term not in numbers}
    # What `where` compares comes first.
    order = dict.fromkeys([*terms, *numbers])
    values, looked_at = (
        Values(taken[at], {name: numbers[name][at] for name in order}) for at in (spread, np.array(job.rows, int))
    )
    return _Found(table.num_rows, took, missing, parts.reshape(-1, 3), values, looked_at, texts)


def _numbers(column: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    import pyarrow as pa

    numbers: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


def _values_of(column: "pa.ChunkedArray", kind: str) -> "Counter[str] | None":
    """How often each value is there; None if there are too many to be those of a label."""
    import pyarrow as pa

    found = column.cast(pa.string()).value_counts()
    if len(found) > MAX_VALUES + 1:
        return None
    return Counter({pair["values"]: pair["counts"] for pair in found.to_pylist() if pair["values"] is not None})


def _joined(parts: list[Values]) -> Values:
    numbers = {name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers}
    return Values(np.concatenate([part.taken for part in parts]), numbers)


def _counted(parts: "list[dict[str, Counter[str] | None]]") -> dict[str, Counter[str]]:
    """The sums over shards, of texts that have few values in all of them."""
    sums: dict[str, Counter[str]] = {}
    for name in parts[0]:
        counts = [part[name] for part in parts]
        total: Counter[str] = sum((c for c in counts if c is not None), Counter())
        if None not in counts and 1 <= len(total) <= MAX_VALUES and name != KEY:
            sums[name] = total
    return sums


def scope(choice: Choice, shards: int) -> str:
    """Of what the counts are, in words.  shards: how many hold samples."""
    part = "all" if choice.shards == shards else f"{choice.shards:,} of {shards:,}"
    return f"{count(choice.receipt.samples, 'sample')} of {part} shards"
