"""Chosen samples: each once an epoch, none of the others, on any ranks, from any step; what is refused and told."""

import io
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

from data.config import DataConfig, DatasetConfig, ValidationConfig
from data.index import Index, index
from data.inspection.choice import look_at_choice
from data.loader.dataset import Dataset, find_datasets, validation_datasets
from data.loader.mixture import Mixture
from data.loader.prompts import stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.selection import choose, stored
from data.selection.rules import Rules
from data.selection.stored import Chosen, SelectionChanged, read_selection, write_selection
from data.selection.where import Where
from data.storage.shards import Shard, read_index
from data.storage.tars import write_shard
from data.text.embeddings import to_bytes
from data.text.meta import TextMeta

pytest_plugins = ["tests.support.faulty_server"]

TOKENS, DIM, SAMPLES, PER_SHARD = 4, 8, 50, 13
WHERE = "score >= 0.5 and min(width, height) >= 20"


def picture(n: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(n).integers(0, 256, (20 + n % 7, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def facts(n: int) -> dict:
    """Even samples score below 0.5; each seventh has no score; urls come in pairs."""
    score = {} if n % 7 == 6 else {"score": (n % 2) / 2 + n / 200}
    return {"url": f"http://a/{n // 2}", "sha256": f"{n:064x}", "width": 24, "height": 20 + n % 7, **score}


def chosen_by_where(n: int) -> bool:
    return n % 7 != 6 and n % 2 == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """50 samples in 4 shards and their embeddings. What WHERE leaves out has damaged pictures."""
    base = tmp_path_factory.mktemp("selection")
    for shard, start in enumerate(range(0, SAMPLES, PER_SHARD)):
        numbers = range(start, min(start + PER_SHARD, SAMPLES))
        rows = [
            (f"{n:09d}", {"jpg": picture(n) if chosen_by_where(n) else b"\xff\xd8 damaged", "txt": f"c {n}".encode(),
                          "json": json.dumps(facts(n)).encode()})
            for n in numbers
        ]  # fmt: skip
        write_shard(base / f"{shard:05d}.tar", rows)
        states = [(f"{n:09d}", {"npy": to_bytes(np.full((TOKENS, DIM), n, np.float32))}) for n in numbers]
        write_shard(base / "text" / f"{shard:05d}.tar", states)
    TextMeta("none", "0", "0", TOKENS, DIM, "float32", "float32", "none").write(base / "text")
    (base / "text/empty.npy").write_bytes(to_bytes(np.full((TOKENS, DIM), -1, np.float32)))
    index(Index(str(base), workers=1))
    return base


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("selection-*")))


def config_of(folder: Path, **rules) -> DataConfig:
    return DataConfig(
        shards=str(folder), text=str(folder / "text"), tokens=TOKENS, streams=4, phases=2, shuffle_block=8,
        cond_drop_prob=0.0, **rules,
    )  # fmt: skip


def chosen_keys(datasets: list[Dataset]) -> list[int]:
    """The numbers of the chosen samples of `folder`."""
    (dataset,) = datasets
    return [shard * PER_SHARD + row for shard in range(len(dataset.shards)) for row in dataset.rows(shard).tolist()]


def read(config: DataConfig, steps: range, ranks: int = 1, workers: int = 0, global_batch: int = 8):
    """pixels, text_emb, visit of whole steps, the ranks' parts put together in order; and the bad samples."""
    datasets, meta, parts, bad = find_datasets(config), TextMeta.read(config.text), [], []
    for rank in range(ranks):
        data = MicroBatches(
            config, datasets, meta, image_size=8, seed=0, global_batch=global_batch, micro_batch=2, rank=rank,
            ranks=ranks, step=steps.start,
        )  # fmt: skip
        batches = micro_batches(data, workers, pin_memory=False)
        got = [next(batches) for _ in range(len(steps) * (global_batch // ranks // 2))]
        bad += [b for batch in got for b in batch.bad]
        parts.append([torch.cat([getattr(b, f) for b in got]) for f in ("pixels", "text_emb", "visit")])
    each = global_batch // ranks
    return (*(torch.cat([p[i].unflatten(0, (len(steps), each)) for p in parts], 1) for i in range(3)), bad)


@st.composite
def selections(draw) -> list[tuple[list[bool], list[bool]]]:
    """For each shard which rows are chosen, and which are held apart; some row is chosen."""
    rows = st.lists(st.sampled_from(["chosen", "held", "out"]), max_size=20)
    shards = draw(st.lists(rows, min_size=1, max_size=6).filter(lambda s: any("chosen" in rows for rows in s)))
    return [([row == "chosen" for row in rows], [row == "held" for row in rows]) for rows in shards]


def dataset_of(masks: list[tuple[list[bool], list[bool]]], folder: Path) -> Dataset:
    shards = [Shard(f"{i}.tar", len(rows), digest=f"{i:032x}") for i, (rows, _) in enumerate(masks)]
    chosen = [Chosen.of(np.array(a, bool), np.array(b, bool), [0], [0]) for a, b in masks]
    location = str(folder / "s.safetensors")
    write_selection(location, "r", ["where x"], shards, chosen)
    return Dataset(shards, "", selection=read_selection(location, "r", shards, "command"))


@settings(max_examples=60, deadline=None)
@given(
    masks=selections(),
    seed=st.integers(0, 5),
    ranks=st.integers(1, 4),
    per_rank=st.integers(1, 5),
    streams=st.integers(1, 8),
    phases=st.integers(1, 3),
    block_size=st.integers(1, 10),
)
def test_each_chosen_sample_comes_once_an_epoch_and_no_other(masks, seed, ranks, per_rank, streams, phases, block_size):
    """On any number of ranks, and also if a run begins anew at any step: each position is located by itself."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(masks, Path(folder))
        n, global_batch = dataset.samples, ranks * per_rank
        assert dataset.counts == [sum(rows) for rows, _ in masks] and n == sum(dataset.counts)
        stored = [shard.count for shard in dataset.shards]
        how = (seed, [dataset.counts], [1.0], global_batch, min(streams, global_batch), phases, block_size, [stored])
        parts: dict[int, int] = {}
        for rank in range(ranks):
            mixture = Mixture(*how)
            for step in range(-(-2 * n // global_batch)):
                for slot in range(rank * per_rank, (rank + 1) * per_rank):
                    number, block, within = mixture.locate(step, slot)
                    shards, numbers, shuffle = mixture.orders[0].rows(block)
                    at = shuffle[within]
                    row = int(dataset.rows(int(shards[at]))[numbers[at]])
                    parts[step * global_batch + slot] = mixture.visit(number, block.epoch, int(shards[at]), row)
        flat = [chosen for rows, _ in masks for chosen in rows]
        wanted = [i for i, chosen in enumerate(flat) if chosen]
        assert sorted(parts[p] for p in range(n)) == wanted
        assert sorted(parts[p] for p in range(n, 2 * n)) == [len(flat) + i for i in wanted]
        held = validation_datasets([dataset])
        rows = [shard_rows for d in held for i in range(len(d.shards)) for shard_rows in d.rows(i).tolist()]
        assert rows == [i for _, mask in masks for i, is_held in enumerate(mask) if is_held]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (1, 3), (2, 2)])
def test_ranks_and_workers_change_nothing_and_a_run_goes_on_in_the_middle(folder, ranks, workers):
    index(Index(str(folder), workers=1, where=WHERE))
    config = config_of(folder, where=WHERE)
    whole = read(config, range(9))
    assert not whole[3], "what is left out must not be decoded"
    for a, b in zip(whole[:3], read(config, range(9), ranks, workers)[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole[:3], read(config, range(4, 9), ranks, workers)[:3], strict=True):
        assert torch.equal(a[4:], b)
    n = len(chosen_keys(find_datasets(config)))
    numbers = whole[1][:, :, 0, 0].flatten().int().tolist()
    assert sorted(numbers[:n]) == [n for n in range(SAMPLES) if chosen_by_where(n)]
    assert sorted(numbers[n : 2 * n]) == sorted(numbers[:n]) != numbers[n : 2 * n]


def test_a_sample_has_the_same_crop_and_key_of_its_draws_whatever_else_is_chosen(folder):
    index(Index(str(folder), workers=1, where=WHERE))
    of_all, of_some = read(config_of(folder), range(7)), read(config_of(folder, where=WHERE), range(3))

    def by_visit(found) -> dict[int, torch.Tensor]:
        return dict(zip(found[2].flatten().tolist(), found[0].flatten(0, 1), strict=True))

    everything, some = by_visit(of_all), by_visit(of_some)
    first = [visit for visit in some if visit < SAMPLES]
    assert len(first) > 15 and all(torch.equal(some[v], everything[v]) for v in first if v in everything)


def test_prompts_are_of_chosen_samples(folder):
    index(Index(str(folder), workers=1, where=WHERE))
    config = config_of(folder, where=WHERE)
    captions = [caption for caption, _ in stored_prompts(find_datasets(config), TextMeta.read(config.text), 10)]
    assert len(captions) == 10 and all(chosen_by_where(int(caption.split()[1])) for caption in captions)


def test_the_command_tells_fields_and_what_each_rule_took_and_a_training_finds_the_selection(own, capsys):
    drop = own / "removed.csv"
    drop.write_text("name,URL\nx,http://a/0\ny,http://a/1\n")
    rules = {"where": WHERE, "drop": [str(drop)]}
    with pytest.raises(ValueError) as error:
        find_datasets(config_of(own, **rules, validation=ValidationConfig(share=0.2)))
    command = re.search(r"run `python -m data.index (.*)`", str(error.value))
    assert command and f"shards={own} where='{WHERE}' drop={drop} validation_share=0.2" == command[1]
    capsys.readouterr()
    index(Index(str(own), workers=2, **rules, validation_share=0.2))
    told = capsys.readouterr().out
    assert "index.json" not in told, "the index is up to date"
    assert re.search(r"score +number +43 of 50\n", told) and re.search(r"url +text +50 of 50\n", told)
    datasets = find_datasets(config_of(own, **rules, validation=ValidationConfig(share=0.2)))
    lines = datasets[0].selection.receipt.lines()
    left = [n for n in range(SAMPLES) if chosen_by_where(n)]
    unknown = sum(n % 7 == 6 for n in range(SAMPLES))
    assert lines[0] == f"where {WHERE} leaves out {SAMPLES - len(left)} ({unknown} of them for a missing field)"
    assert lines[1] == f"drop removed.csv by url leaves out {sum(n < 4 for n in left)}"
    left = [n for n in left if n >= 4]
    keys, held = chosen_keys(datasets), chosen_keys(validation_datasets(datasets))
    assert sorted(keys + held) == left and held and lines[2] == f"validation share 0.2 holds apart {len(held)}"
    assert lines[3].startswith(f"{len(keys)} of {SAMPLES} samples are chosen") and all(line in told for line in lines)
    # The same list elsewhere is the same rule; another one is not.
    moved = drop.rename(own / "moved.csv")
    assert (
        chosen_keys(find_datasets(config_of(own, where=WHERE, drop=[str(moved)], validation=ValidationConfig(0.2))))
        == keys
    )
    moved.write_text("url\nhttp://a/3\n")
    with pytest.raises(ValueError, match="there is no"):
        find_datasets(config_of(own, where=WHERE, drop=[str(moved)], validation=ValidationConfig(0.2)))


def test_shards_without_samples_are_refused(tmp_path):
    write_shard(tmp_path / "0.tar", [])
    for rules in ({"validation_share": 0.1}, {"where": "x > 1"}):
        with pytest.raises(ValueError, match="the shards hold no samples"):
            index(Index(str(tmp_path), workers=1, **rules))


@pytest.mark.parametrize("rows", [
    {"url": [["http://a/1"]]}, {"url": [{"a": "http://a/1"}]}, {"url": ["http://a/1"], "group": [[1]]},
    {"key": [b"\xff"]},
])  # fmt: skip
def test_a_list_of_lists_or_bytes_is_refused_by_name(folder, tmp_path, rows):
    drop = write_list(tmp_path / "odd.parquet", rows)
    with pytest.raises(ValueError, match=r"the list '.*odd\.parquet'") as error:
        index(Index(str(folder), workers=1, drop=[drop]))
    assert "\n" not in str(error.value)


def test_a_list_with_two_columns_of_a_name_is_refused(folder, tmp_path):
    (tmp_path / "twice.csv").write_text("url,url\na,b\n")
    pq.write_table(pa.table([["a"], ["b"]], names=["url", "url"]), tmp_path / "twice.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"the list '.*' has several columns url"):
            index(Index(str(folder), workers=1, drop=[str(path)]))


def write_list(path: Path, rows: dict[str, list]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join([",".join(rows), *lines]) + "\n")
    else:
        path.write_text("\n".join(map(str, next(iter(rows.values())))) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("name", "rows", "gone"),
    [
        ("keys.parquet", {"key": ["000000003", "000000044", "777"]}, [3, 44]),
        ("keys.csv", {"key": ["000000003", "000000044"]}, [3, 44]),
        ("keys.txt", {"": ["000000003", "", "000000044  "]}, [3, 44]),
        ("urls.parquet", {"TEXT": ["a", "b"], "URL": ["http://a/2", None], "key": ["x", "y"]}, [4, 5]),
        ("urls.txt", {"": ["http://a/2"]}, [4, 5]),
        ("hashes.csv", {"sha256": [f"{7:064x}"]}, [7]),
        ("hashes.txt", {"": [f"{7:064x}"]}, [7]),
        # Of each group of duplicates the first stays.
        ("same.parquet", {"key": [f"{n:09d}" for n in (1, 2, 9, 30, 31)], "group": [0, 0, 0, 1, None]}, [2, 9]),
        ("none.csv", {"key": []}, []),
    ],
)  # fmt: skip
def test_a_list_drops_by_the_column_that_it_has(folder, tmp_path, name, rows, gone):
    drop = write_list(tmp_path / name, rows)
    index(Index(str(folder), workers=1, drop=[drop]))
    kept = chosen_keys(find_datasets(config_of(folder, drop=[drop])))
    assert sorted(set(range(SAMPLES)) - set(kept)) == gone


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.parquet"])
def test_hashes_are_compared_whole_in_any_case_and_after_a_byte_order_mark(tmp_path, name, parquet):
    numbers = [2**63 + 1, 2**63 + 2, 5]
    facts = [{"phash": number, "md5": f"{number:032x}"} for number in numbers]
    write_shard(tmp_path / "0.tar", [(str(n), {"jpg": b"x", "txt": b"t", "json": json.dumps(f).encode()})
                                     for n, f in enumerate(facts)])  # fmt: skip
    if parquet:
        columns = {"key": ["0", "1", "2"], "phash": pa.array(numbers, pa.uint64()), "md5": [f["md5"] for f in facts]}
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    rows = {"md5": [f"{numbers[1]:032X}"]} if name == "a.txt" else {"phash": pa.array([numbers[1]], pa.uint64())}
    drop = Path(write_list(tmp_path / name, rows))
    if drop.suffix != ".parquet":
        drop.write_bytes(b"\xef\xbb\xbf" + drop.read_bytes())
    where = "phash > 6 or phash < 5.5"
    index(Index(str(tmp_path), workers=1, drop=[str(drop)], where=where))
    config = DataConfig(shards=str(tmp_path), text="t", drop=[str(drop)], where=where)
    assert find_datasets(config)[0].rows(0).tolist() == [0, 2]


def test_a_sample_without_the_field_of_a_list_stays_and_is_counted(own, capsys):
    write_shard(own / "00009.tar", [("x", {"jpg": picture(0), "txt": b"c", "json": b"{}"})])
    drop = write_list(own / "d.parquet", {"url": ["http://a/2", ""]})
    index(Index(str(own), workers=1, drop=[drop]))
    told = capsys.readouterr().out
    assert "leaves out 2 (1 could not be compared, for they lack the field)" in told and "49 of 51 samples" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,group\nx,1\n", "has no column url, sha256, .* or key: it has name, group"),
        ("a.txt", "000000003\nhttp://a/2\n", "has lines of several kinds"),
        ("a.parquet", "no parquet", "can't be read"),
        ("a.json", "[]", r"must end in \.parquet, \.csv or \.txt"),
        ("a.csv", "md5\nff\n", "lists values of md5, but of 50 samples in 4 shards: no sample has a field 'md5'"),
    ],
)
def test_a_wrong_list_is_refused(folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        index(Index(str(folder), workers=1, drop=[str(tmp_path / name)]))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("scoer > 0.5", r"no sample has a field 'scoer' \(did you mean 'score'\?\); fields: height, key, score"),
        ("SCORE > 0.5", r"did you mean 'score'"),
        ("url > 3", "compares a text with a number"),
        ("score > 500", "of 50 samples none is chosen"),
    ],
)
def test_rules_that_cannot_be_or_leave_nothing_are_refused_and_write_nothing(own, where, message):
    before = sorted(own.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        index(Index(str(own), workers=1, where=where))
    assert "\n" not in str(error.value) and sorted(own.iterdir()) == before


def selection_of(folder: Path, **rules) -> Path:
    """The file of a selection that is made."""
    before = set(folder.glob("selection-*"))
    index(Index(str(folder), workers=1, **rules))
    (made,) = set(folder.glob("selection-*")) - before
    return made


def test_shards_that_changed_since_are_refused_with_the_command(own):
    made = selection_of(own, where=WHERE)
    write_shard(own / "00001.tar", [("x", {"jpg": picture(1), "txt": b"new", "json": b'{"score": 1}'})])
    index(Index(str(own), workers=1))
    with pytest.raises(
        ValueError, match=r"1 of 4 shards changed since '.*' was made \(such as 00001.tar\).*run `python"
    ):
        find_datasets(config_of(own, where=WHERE))
    index(Index(str(own), workers=1, where=WHERE))
    assert find_datasets(config_of(own, where=WHERE)) and made.exists()
    (own / "index.json").unlink()
    for stats in own.glob("*_stats.json"):  # as img2dataset writes them
        stats.write_text(json.dumps({"successes": json.loads(stats.read_text())["successes"]}))
    with pytest.raises(ValueError, match="or have no index: run `python"):
        find_datasets(config_of(own, where=WHERE))


def test_a_field_that_only_later_samples_have_is_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose, "PEEK_SAMPLES", 2)
    for name in ("0", "1"):
        rows = [(f"{name}{n}", {"jpg": b"x", "txt": b"t", "json": json.dumps({"never": None, "p": p}).encode()})
                for n, p in enumerate([None, None, 0.9, 0.1])]  # fmt: skip
        write_shard(tmp_path / f"{name}.tar", rows)
    where = "(p is None or p < 0.5) and never is None"
    index(Index(str(tmp_path), workers=1))
    with pytest.raises(ValueError, match="sample 02 has a number as p, which none of the first samples has"):
        look_at_choice(read_index(str(tmp_path / "index.json")), {0: [0]}, Rules(where), 1)
    index(Index(str(tmp_path), workers=1, where=where))
    told = capsys.readouterr().out
    assert "no first sample has a value of never, p: all samples are looked at" in told
    assert "6 of 8 samples are chosen" in told


@pytest.mark.parametrize("digest", ["", "0" * 30, "no digest"])
def test_an_index_without_digests_is_refused_before_the_work(own, digest, capsys):
    facts = json.loads((own / "index.json").read_text())
    facts["shards"][1]["digest"] = digest
    other = own / "other.json"
    other.write_text(json.dumps(facts))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"1 shard of '.*other\.json' \(such as 00001.tar\) .* no digest.*run `python"):
        index(Index(str(other), workers=1, where=WHERE))
    assert not capsys.readouterr().out
    # Of shards that are given themselves the index is made again.
    other.rename(own / "index.json")
    index(Index(str(own), workers=1, where=WHERE))
    assert find_datasets(config_of(own, where=WHERE))


def test_an_index_that_is_made_again_for_rules_keeps_its_captions(own, capsys):
    index(Index(str(own), workers=1, captions=["url"]))
    before = [shard.caption_digests for shard in read_index(str(own / "index.json"))]
    assert all(before)
    capsys.readouterr()
    write_shard(own / "00004.tar", [("x", {"jpg": picture(1), "txt": b"c", "json": json.dumps(facts(1)).encode()})])
    index(Index(str(own), workers=1, where=WHERE))
    assert "is made again, as before with the captions url" in capsys.readouterr().out
    after = [shard.caption_digests for shard in read_index(str(own / "index.json"))]
    assert after[:4] == before and set(after[4]) == {"url"}
    # By the plain command it has those that are given.
    index(Index(str(own), workers=1))
    assert not any(shard.caption_digests for shard in read_index(str(own / "index.json")))


def test_any_damaged_byte_is_found(own):
    made = selection_of(own, where=WHERE)
    whole = made.read_bytes()
    dataset = find_datasets(config_of(own, where=WHERE))[0]
    expected = [dataset.rows(shard).tolist() for shard in range(4)]
    generator = np.random.default_rng(0)
    for at in [*generator.integers(0, len(whole), 150).tolist(), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        made.write_bytes(damaged)
        try:
            found = find_datasets(config_of(own, where=WHERE))[0]
            assert [found.rows(shard).tolist() for shard in range(4)] == expected  # a space in the header
        except ValueError as error:
            assert "run `python -m data.index" in str(error)
        except SelectionChanged as error:
            assert "is damaged" in str(error)
    for cut in (0, 5, 100, len(whole) - 3):
        made.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is no selection, or damaged"):
            find_datasets(config_of(own, where=WHERE))


def test_a_selection_that_does_not_say_its_rules_is_refused(own):
    made = selection_of(own, where=WHERE)
    tensors = load(made.read_bytes())
    about = json.dumps({"texts": ["where"], "shards": [f"{n:05d}.tar" for n in range(4)]})
    tensors["head"] = np.frombuffer(stored._head_digest(about, tensors), "u1")
    made.write_bytes(save(tensors, {"about": about}))
    with pytest.raises(ValueError, match=r"is no selection, or damaged \('rules'\): run `python"):
        find_datasets(config_of(own, where=WHERE))


def test_a_selection_that_is_made_again_with_other_rows_ends_a_run_that_reads_it(own):
    made = selection_of(own, where=WHERE)
    dataset = find_datasets(config_of(own, where=WHERE))[0]
    other = selection_of(own, where=f"not ({WHERE})")
    shutil.copy(other, made)
    with pytest.raises(SelectionChanged, match="made again since the training began"):
        [dataset.rows(shard) for shard in range(4)]


def test_what_an_interrupted_run_has_done_is_not_done_again(own, monkeypatch, capsys):
    expected = selection_of(own, where=WHERE).read_bytes()
    (made,) = own.glob("selection-*")
    made.unlink()
    real, looked = choose.choose, []

    def dies_at_the_third(plan, shard):
        looked.append(shard.name)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return real(plan, shard)

    monkeypatch.setattr(choose, "choose", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index(Index(str(own), workers=1, where=WHERE))
    assert not made.exists()
    capsys.readouterr()
    index(Index(str(own), workers=1, where=WHERE))
    assert "goes on with an interrupted run: 2 shards are done" in capsys.readouterr().out
    assert looked[3:] == ["00002.tar", "00003.tar"]
    assert made.read_bytes() == expected and not list(own.glob("*.unfinished"))


def test_what_an_interrupted_run_chose_by_scores_that_changed_since_is_chosen_again(own, monkeypatch):
    def score(shard: str, value: float) -> None:
        rows = [{"key": f"{n:09d}", "status": "success", "caption": f"c {n}", "score": value}
                for n in range(int(shard) * PER_SHARD, min(SAMPLES, (int(shard) + 1) * PER_SHARD))]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), own / f"{shard}.parquet")

    score("00001", 0.9)
    real, looked = choose.choose, []

    def dies_at_the_third(plan, shard):
        looked.append(shard.name)
        if len(looked) == 3:
            # Written while the run is on, and as old as copies with their times are.
            for name in ("00000", "00001"):
                score(name, 0.1)
                os.utime(own / f"{name}.parquet", (1, 1))
            raise OSError("the disk is full")
        return real(plan, shard)

    monkeypatch.setattr(choose, "choose", dies_at_the_third)
    with pytest.raises(OSError, match="disk"):
        index(Index(str(own), workers=1, where="score > 0"))
    index(Index(str(own), workers=1, where="score > 0"))
    assert looked[3:] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]


def test_the_validation_share_depends_on_keys_alone(folder):
    def held(share: float, **rules) -> set[int]:
        index(Index(str(folder), workers=1, validation_share=share, **rules))
        datasets = find_datasets(config_of(folder, validation=ValidationConfig(share=share), **rules))
        apart = set(chosen_keys(validation_datasets(datasets)))
        assert not apart & set(chosen_keys(datasets))
        assert rules or len(apart) + datasets[0].samples == SAMPLES
        return apart

    small, large = held(0.1), held(0.5)
    assert small < large and 10 < len(large) < 40
    assert held(0.5, where=WHERE) == {n for n in large if chosen_by_where(n)}
    with pytest.raises(ValueError, match=r"data.validation.share=1 must be at least 0 and less than 1"):
        ValidationConfig(share=1)
    assert not validation_datasets(find_datasets(config_of(folder)))


def test_rules_of_a_mixture_are_those_for_all_and_the_dataset_s_own(folder):
    given = DataConfig(
        mixture={"a": DatasetConfig("a", "t", where="x > 1", drop=["a.txt"]), "b": DatasetConfig("b", "t")},
        where="y < 2 or z", drop=["all.csv"],
    )  # fmt: skip
    assert [(d.where, d.drop) for d in given.datasets()] == [
        ("(y < 2 or z) and (x > 1)", ["all.csv", "a.txt"]), ("y < 2 or z", ["all.csv"]),
    ]  # fmt: skip
    commented = DataConfig(mixture={"a": DatasetConfig("a", "t", where="x > 1  # large")}, where="y < 2 # small")
    values = pa.table({"x": [2, 2, 1], "y": [1, 2, 1]})
    assert Where(commented.datasets()[0].where).evaluate(values).to_pylist() == [True, False, False]
    index(Index(str(folder), workers=1, where=WHERE))
    one = DatasetConfig(str(folder), str(folder / "text"), where=WHERE)
    mixed = find_datasets(DataConfig(mixture={"some": one, "all": replace(one, where="")}))
    assert [dataset.samples for dataset in mixed] == [len([n for n in range(50) if chosen_by_where(n)]), 50]


def test_shards_behind_urls_have_their_selection_beside_the_index(folder, tmp_path, http_server):
    http_server.files.update({path.name: path.read_bytes() for path in folder.glob("0*.*")})
    where = f"{http_server.url}/{{00000..00003}}.tar"
    listed = tmp_path / "there.json"
    with pytest.raises(
        ValueError, match=r"where shards are given as a folder or an index: run `python .*out=FILE\.json"
    ):
        find_datasets(replace(config_of(folder, where=WHERE), shards=str(folder / "{00000..00003}.tar")))
    index(Index(where, out=str(listed), workers=1, where=WHERE))
    config = replace(config_of(folder, where=WHERE), shards=str(listed))
    assert chosen_keys(find_datasets(config)) == [n for n in range(50) if chosen_by_where(n)]
    # An index of other shards in the same folder has a selection of its own.
    other = tmp_path / "other.json"
    index(Index(where.replace("3}", "1}"), out=str(other), workers=1, where=WHERE))
    for one in (config, replace(config, shards=str(other))):
        assert find_datasets(one)[0].selection
    # Further rules need no second count.
    index(Index(str(listed), workers=1, where="score < 0.3"))
    assert len(list(tmp_path.glob("selection-there-*"))) == 2
