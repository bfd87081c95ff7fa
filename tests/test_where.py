"""The fields of samples, and the expression over them: what is true, what a missing value means, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.selection.fields import read_fields
from data.selection.where import Where
from data.storage.shards import Shard, find_shards
from data.storage.tars import scan_shard, write_shard

FIELDS = {
    "similarity": [0.3, 0.2, None, 0.5], "width": [64, 100, 200, 300], "height": [100, 64, 3, None],
    "caption": ["a cat", "Dog on a mat", "", None], "ok": [True, False, None, True],
}  # fmt: skip
TABLE = pa.table({**FIELDS, "never": pa.nulls(4)})
YES, NO, OPEN = True, False, None


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("similarity >= 0.28 and min(width, height) >= 64 and len(caption) >= 5", [YES, NO, NO, OPEN]),
        # Either side decides where it can, whatever is missing on the other.
        ("similarity < 0.4 or width > 150", [YES, YES, YES, YES]),
        ("similarity < 0.4 and width > 150", [NO, NO, OPEN, NO]),
        ("not similarity < 0.4", [NO, NO, OPEN, YES]),
        ("similarity is None or similarity > 0.4", [NO, NO, YES, YES]),
        ("similarity is not None", [YES, YES, NO, YES]),
        ("64 <= width < 200", [YES, YES, NO, NO]),
        ("caption == 'a cat' or 'mat' in caption", [YES, YES, NO, OPEN]),
        ("lower(caption) in ('dog on a mat', '')", [NO, YES, YES, OPEN]),
        ("caption not in ['a cat']", [NO, YES, YES, OPEN]),
        ("'Cat' not in caption", [YES, YES, YES, OPEN]),
        ("ok", [YES, NO, OPEN, YES]),
        ("not ok and width == 100", [NO, YES, NO, NO]),
        ("max(width, height, 101) > 101", [NO, NO, YES, OPEN]),
        ("width / height > 2 and abs(height - width) > 100", [NO, NO, YES, OPEN]),
        ("-width * 2 + 1 < -200", [NO, NO, YES, YES]),
        ("(width - width) / 0 > 1", [OPEN] * 4),
        ("never > 3", [OPEN] * 4),
        ("never in ('a',) or never is None", [YES] * 4),
        ("len(never) > 3 or lower(never) == 'a' or max(never, 3) > 2", [OPEN] * 4),
        ("field('width') == 64", [YES, NO, NO, NO]),
        (f"{10**30} > width", [YES] * 4),
        ("1 == 1", [YES] * 4),
        ("width < 250\n  and height > 70", [YES, NO, NO, NO]),
    ],
)
def test_an_expression_is_true_false_or_open(text, outcome):
    assert Where(text).evaluate(TABLE).to_pylist() == outcome
    Where(text).check_kinds({"similarity": "number", "width": "number", "height": "number", "caption": "text",
                             "ok": "true or false", "never": ""})  # fmt: skip


def test_whole_numbers_that_floating_point_does_not_hold_are_compared():
    table = pa.table({"id": [2**53 + 1, 3, None], "x": [0.5, 4.0, 1.0]})
    for text, outcome in {
        "id > 0.5": [YES, YES, OPEN],
        "x < id": [YES, NO, OPEN],
        "id in (0.5, 3)": [NO, YES, OPEN],
        "x in (4, 9007199254740993)": [NO, YES, NO],
        "max(id, x, 3.5) > 4": [YES, NO, OPEN],
        f"id == {2**53 + 1} and id != {2**53}": [YES, NO, OPEN],
    }.items():
        assert Where(text).evaluate(table).to_pylist() == outcome, text
    assert Where("id").numbers(table).to_pylist() == [2.0**53, 3.0, None]


numbers = st.one_of(st.none(), st.floats(-5, 5, width=16))
either = st.sampled_from(["and", "or"])
comparison = st.builds("{} {} {}".format, st.sampled_from("ab"), st.sampled_from(["<", ">=", "==", "!="]),
                       st.sampled_from(["a", "b", "1", "-0.5", "a + b", "min(a, b)"]))  # fmt: skip
texts = st.recursive(
    comparison,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner), st.builds("({}) {} ({})".format, inner, either, inner)
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(text=texts, a=numbers, b=numbers)
def test_it_is_what_python_says_of_all_ways_to_fill_in_what_is_missing(text, a, b):
    """Known values give Python's own outcome. With a missing one, an outcome that is not open holds for any value."""
    row = pa.table({"a": pa.array([a], pa.float64()), "b": pa.array([b], pa.float64())})
    outcome = Where(text).evaluate(row).to_pylist()[0]
    fills = [-7.0, -0.5, 0.0, 1.0, 7.0]
    possible = {
        bool(eval(text, {"min": min}, {"a": x, "b": y}))
        for x in (fills if a is None else [a])
        for y in (fills if b is None else [b])
    }
    if a is not None and b is not None:
        assert {outcome} == possible
    elif outcome is not None:
        assert possible == {outcome}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('x') == 0", "no function '__import__"),
        ("open('/etc/passwd') == 1", "no function 'open'"),
        ("read_csv('/etc/passwd') == 1", "no function 'read_csv'"),
        ("width.__class__ == 1", "`width.__class__` is not known here"),
        ("[x for x in width]", "is not known here"),
        ("(lambda: 1)() == 1", "no function"),
        ("width ** 9 ** 9 ** 9 > 1", "is not known here"),
        ("f'{width}' == 'a'", "is not known here"),
        ("caption[0] == 'a'", "is not known here"),
        ("(y := 3) > 2", "is not known here"),
        ("width > 1; copy t to 'x'", "invalid syntax"),
        ("width > 1 AND height > 1", "invalid syntax at character 11"),
        ("width = 3", "invalid syntax"),
        ("width > 1 & height > 1", "write and, or"),
        ("min(width) > 1", "min() takes two or more values"),
        ("length(caption) > 1", "no function 'length' (did you mean 'len'?)"),
        ("width == None", "write `is None`"),
        ("width is 3", "`is` stands before None alone"),
        ("'a' < width", "compares a text with a number"),
        ("len(width) > 1", "`width` is a number, where a text is needed"),
        ("width in ('a', 3)", "looks for a number among others"),
        ("width in ()", "list numbers or texts after `in`"),
        ("width in caption", "before `in` stands a text in quotes"),
        ("width", "it gives a number, not true or false"),
        ("'no' or ok", "is a text, where a true or false is needed"),
        ("", "invalid syntax"),
        ("width\0> 1", "null bytes"),
        ("caption == 'a\ud800'", "surrogates"),
        ("caption == '\\ud800'", "surrogates"),
        ("(" * 900 + "width" + ")" * 900, ""),
        ("not " * 990 + "ok", ""),
        ("-" * 3990 + "1 > 2", "nested too deeply"),
        ("1" * 3990 + " > 2", "too large"),
        ("ok or " * 800 + "ok", "more than 4000"),
    ],
    ids=lambda text: text[:30].encode("unicode_escape").decode(),
)  # fmt: skip
def test_what_is_no_such_expression_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError) as error:
        Where(text).evaluate(TABLE)
    told = str(error.value)
    assert message in told and told.startswith("where=") and "\n" not in told and len(told) < 900
    assert "similarity >= 0.28" in told or message == "more than 4000"


def test_a_config_refuses_it_too():
    with pytest.raises(ValueError, match="no function 'open'"):
        DataConfig(where="open('a') > 1")


RECORDS = [
    {"similarity": 0.3, "width": 5, "caption": "a", "tags": ["x"], "safe": True, "id": 2**60 + 1},
    {"similarity": 1, "width": 6, "caption": None, "id": 3},
    {"similarity": float("nan"), "width": "wide", "caption": "\ud800", "id": 4},
    {"similarity": "0.5", "caption": "é", "safe": 1, "new": None},
]


def write(folder: Path, records: list[bytes], stats: bool = True) -> Shard:
    rows = [(f"{n:04d}", {"jpg": b"x", "txt": b"t", "json": text} if text else {"jpg": b"x"})
            for n, text in enumerate(records)]  # fmt: skip
    write_shard(folder / "00000.tar", rows)
    return find_shards(folder)[0]


def test_fields_of_json_have_one_kind_each_and_what_is_of_another_is_missing(tmp_path):
    damaged = [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"width": 1' + b"0" * 5000 + b"}", b""]
    shard = write(tmp_path, [json.dumps(record).encode() for record in RECORDS] + damaged)
    table = read_fields(shard)
    found = {name: table[name].to_pylist() for name in table.column_names}
    nothing = [None] * len(damaged)
    assert found == {
        "key": [f"{n:04d}" for n in range(len(RECORDS) + len(damaged))],
        "similarity": [0.3, 1.0, None, None, *nothing],
        "width": [5, 6, None, None, *nothing],
        "caption": ["a", None, "?", "é", *nothing],
        "safe": [None, None, None, 1, *nothing],
        "id": [2**60 + 1, 3, 4, None, *nothing],
        "new": [None] * table.num_rows,
    }
    assert read_fields(shard, {"width", "absent"}).column_names[0] == "key"
    assert read_fields(shard, ["width"], most=2).to_pydict() == {"key": ["0000", "0001"], "width": [5, 6]}


def as_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_fields_of_a_parquet_go_by_key_and_failed_downloads_are_none(tmp_path):
    shard = write(tmp_path, [b"{}"] * 3)
    rows = [
        {"key": "0002", "status": "success", "score": 2.0, "caption": "t"},
        {"key": "0007", "status": "failed_to_download", "score": 7.0, "caption": "t"},
        {"key": "0000", "status": "success", "score": math.nan, "caption": "t"},
        {"key": "0001", "status": "failed_to_resize", "score": 1.0, "caption": "t"},
    ]
    as_parquet(tmp_path / "00000.parquet", rows)
    for known in (shard, replace(shard, digest=None)):
        assert read_fields(known, ["score"]).to_pydict() == {
            "key": ["0000", "0001", "0002"],
            "score": [None, None, 2.0],
        }


def test_a_parquet_that_has_the_captions_of_the_tar_in_its_order_spares_reading_the_tar(tmp_path, monkeypatch):
    shard = write(tmp_path, [b"{}"] * 3)
    rows = [{"key": f"{n:04d}", "status": "success", "score": n, "caption": "t"} for n in range(3)]
    as_parquet(tmp_path / "00000.parquet", rows)
    whole = read_fields(shard)
    (tmp_path / "00000.tar").write_bytes(b"")
    assert read_fields(shard) == whole
    as_parquet(tmp_path / "00000.parquet", rows[::-1])
    with pytest.raises(ValueError, match="holds 0 samples, its index says 3: run `python -m data"):
        read_fields(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no parquet", "is not a readable parquet file"),
        ([{"id": 1}], "has no column 'key'"),
        ([{"key": "9"}], "has none of the keys of the tar beside it"),
    ],
)
def test_a_wrong_parquet_is_refused(tmp_path, content, message):
    shard, path = write(tmp_path, [b"{}"]), tmp_path / "00000.parquet"
    path.write_bytes(content) if isinstance(content, bytes) else as_parquet(path, content)
    with pytest.raises(ValueError, match=message):
        read_fields(shard)


def test_real_shards_have_the_same_fields_in_json_and_parquet(shared, tmp_path):
    for shard in find_shards(shared / "data/fluent")[:3]:
        by_parquet = read_fields(replace(shard, digest=scan_shard(shard.location).digests["txt"]))
        alone = tmp_path / shard.name
        alone.write_bytes(Path(shard.location).read_bytes())
        by_json = read_fields(replace(shard, location=str(alone)))
        assert by_json.num_rows == shard.count > 50
        assert by_json.select(sorted(by_json.column_names)) == by_parquet.select(sorted(by_parquet.column_names))
