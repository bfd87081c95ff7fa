"""Embeddings of other captions than the shards', though names, keys and counts fit: refused wherever they are read."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig
from data.embed import Embed, embed
from data.index import Index, index
from data.inspect import Inspect, inspect
from data.loader.cursor import ShardCursor
from data.loader.dataset import find_datasets
from data.loader.prompts import stored_prompts
from data.loader.stream import MicroBatches, micro_batches
from data.storage.shards import Shard, find_shards
from data.storage.tars import read_shard, stats_path, write_shard
from data.text.meta import TextMeta, check_sidecars
from data.text.sidecar_record import WrongSidecar
from tests.checkpoints import write_run
from tests.support.trainings import launch, make_data
from tests.test_evaluate import NET, assert_one_line
from train import evaluate, sample

pytest_plugins = ["tests.support.faulty_server"]

OTHER = r"are of other captions than 4 of 4 shards hold \(first: 00000\.tar\): name the embeddings of these shards, or"


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> Path:
    """Shards, their embeddings and an encoder."""
    return make_data(tmp_path_factory.mktemp("right"))


def rewrite(folder: Path, to: Path, caption=lambda caption: caption, key=lambda key: key, digests: bool = True) -> Path:
    """The shards with other captions or keys; without digests as another program would leave them."""
    for shard in find_shards(folder):
        samples = read_shard(shard.location, {"jpg", "txt"})
        rows = [(key(k), members | {"txt": caption(members["txt"])}) for k, members in samples]
        write_shard(to / shard.name, rows, {} if digests else {"digest": None})
    return to


@pytest.fixture(scope="module")
def wrong(right, tmp_path_factory) -> Path:
    """Shards with the names, keys and counts of the right ones, and other captions."""
    return rewrite(right / "shards", tmp_path_factory.mktemp("wrong"), bytes.upper)


@pytest.fixture(scope="module")
def unknown(right, tmp_path_factory) -> Path:
    """The same, without the digests that would tell before anything is read."""
    return rewrite(right / "shards", tmp_path_factory.mktemp("unknown"), bytes.upper, digests=False)


def test_they_are_refused_by_their_stats_files(right, wrong, unknown, tmp_path):
    text = right / "text"
    check_sidecars(find_shards(right / "shards"), text, 0, 0)
    with pytest.raises(
        WrongSidecar, match=OTHER + r".* run `python -m data\.embed shards=\S* out=\S*`, which makes anew"
    ):
        check_sidecars(find_shards(wrong), text, 0, 0)
    check_sidecars(find_shards(unknown), text, 0, 0)  # nothing tells yet
    index(Index(str(unknown), out=str(tmp_path / "index.json"), workers=1))
    with pytest.raises(WrongSidecar, match=OTHER):
        check_sidecars(find_shards(tmp_path / "index.json"), text, 0, 0)
    other_keys = rewrite(right / "shards", tmp_path / "keys", key=lambda key: f"x{key}")
    with pytest.raises(WrongSidecar, match=OTHER):
        check_sidecars(find_shards(other_keys), text, 0, 0)


def test_an_index_of_the_embeddings_tells_too(right, wrong, tmp_path, s3_server):
    text = Path(shutil.copytree(right / "text", tmp_path / "text"))
    index(Index(str(text), workers=1))
    shards, others = find_shards(right / "shards"), find_shards(wrong)
    check_sidecars(shards, text, 0, 0)
    with pytest.raises(WrongSidecar, match=OTHER):
        check_sidecars(others, text, 0, 0)
    for name in ("meta.json", "index.json"):
        s3_server.put(name, (text / name).read_bytes())
    check_sidecars(shards, s3_server.where, 0, 0)
    with pytest.raises(WrongSidecar, match=OTHER):
        check_sidecars(others, s3_server.where, 0, 0)
    # An index that was not made again after the embeddings were: the stats files are newer.
    embed(Embed(str(wrong), str(text)))
    check_sidecars(others, text, 0, 0)


def test_cut_sidecars_are_told_before_a_training_with_the_remedy(right, tmp_path):
    text = Path(shutil.copytree(right / "text", tmp_path / "text"))
    for name in ("00001.tar", "00003.tar"):
        os.truncate(text / name, (text / name).stat().st_size - 1024)
    shards = find_shards(right / "shards")
    said = r"2 of 4 sidecars in '.*' were cut or changed .*\(first: 00001\.tar\): run `.*data\.embed .* mode=repair`"
    with pytest.raises(ValueError, match=said):
        check_sidecars(shards, text, 0, 0)
    with pytest.raises(ValueError, match="could be counted"):
        index(Index(str(text), workers=1))
    embed(Embed(str(right / "shards"), str(text), mode="repair"))
    check_sidecars(shards, text, 0, 0)


def test_embeddings_without_a_record_are_used_and_that_is_told(right, wrong, tmp_path, caplog):
    text = Path(shutil.copytree(right / "text", tmp_path / "text"))
    for path in text.glob("*_stats.json"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        check_sidecars(find_shards(wrong), text, 0, 0)
    assert "4 of 4 sidecars in" in caplog.text and "do not record their captions (first: 00000.tar)" in caplog.text
    assert ShardCursor(find_shards(wrong)[0], str(text)).read(3).problem == ""


@pytest.mark.parametrize("of", ["captions", "keys"])
def test_the_loader_compares_each_caption(right, unknown, tmp_path, of):
    shards = unknown
    if of == "keys":
        shards = rewrite(right / "shards", tmp_path / "keys", key=lambda key: f"x{key}", digests=False)
    said = (
        rf"text/00000\.tar' has no embedding of the caption of {'x' if of == 'keys' else ''}000000005 in '00000\.tar'"
    )
    with pytest.raises(WrongSidecar, match=said + ": it was made from other shards"):
        ShardCursor(find_shards(shards)[0], str(right / "text")).read(5)
    for row in (0, 5, 23):
        assert ShardCursor(find_shards(right / "shards")[0], str(right / "text")).read(row).problem == ""


def test_one_caption_that_was_changed_is_found_when_it_is_read(right, tmp_path):
    rows = list(read_shard(right / "shards" / "00000.tar", {"jpg", "txt"}))
    rows[7][1]["txt"] = b"another"
    rows[8] = (rows[8][0], {"jpg": rows[8][1]["jpg"]})  # without a caption nothing can be compared
    write_shard(tmp_path / "00000.tar", rows)
    cursor = ShardCursor(Shard(str(tmp_path / "00000.tar"), 24), str(right / "text"))
    assert [cursor.read(row).problem for row in range(7)] == [""] * 7
    with pytest.raises(WrongSidecar, match="caption of 000000007"):
        cursor.read(7)
    assert cursor.read(8).problem == cursor.read(9).problem == ""


def test_all_that_read_embeddings_refuse_them(right, wrong, unknown, tmp_path):
    config = DataConfig(shards=str(unknown), text=str(right / "text"), tokens=16, streams=2, cond_drop_prob=0.0)
    datasets, meta = find_datasets(config), TextMeta.read(right / "text")
    with pytest.raises(WrongSidecar):
        stored_prompts(datasets, meta, 4)
    stream = MicroBatches(config, datasets, meta, image_size=16, seed=0, global_batch=8, micro_batch=8)
    for workers in (0, 1):
        with pytest.raises(WrongSidecar):
            next(micro_batches(stream, workers, pin_memory=False))
    for shards in (wrong, unknown):
        with pytest.raises(WrongSidecar):
            inspect(Inspect(str(shards), str(tmp_path / "report.html"), str(right / "text")))
    right_ones = replace(config, shards=str(right / "shards"))
    assert len(stored_prompts(find_datasets(right_ones), meta, 4)) == 4
    assert not (tmp_path / "report.html").exists()


def test_the_commands_that_draw_refuse_them_in_one_line(right, wrong, unknown, tmp_path, capsys):
    run = write_run(
        tmp_path / "run", NET, right / "text", data=DataConfig(shards=str(unknown), text=str(right / "text"))
    )
    with pytest.raises(SystemExit) as caught:
        sample.main([f"checkpoint={run}", f"out={tmp_path / 'drawn'}", "steps=2"])
    assert_one_line(caught, capsys, "has no embedding of the caption of")
    for shards, message in ((wrong, "are of other captions than 4 of 4 shards"), (unknown, "has no embedding of the")):
        given = [f"shards={shards}", f"text={right / 'text'}", "scores=[alignment]", "samples=4", "steps=2"]
        with pytest.raises(SystemExit) as caught:
            evaluate.main([f"checkpoint={run}", *given, f"out={tmp_path / 'scores'}"])
        assert_one_line(caught, capsys, message)


@pytest.mark.parametrize(("ranks", "known"), [(1, True), pytest.param(2, False, marks=pytest.mark.slow)])
def test_a_training_ends_with_one_line(repo, right, wrong, unknown, tmp_path, ranks, known):
    """Before it begins where the stats files tell, else at the first sample, which a loader worker reads."""
    shards = wrong if known else unknown
    done = launch(repo, right, tmp_path / "run", f"data.shards={shards}", "sample.every=0", "steps=3", ranks=ranks)
    assert done.returncode != 0 and (ranks > 1 or done.returncode == 2)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert errors and "Traceback" not in done.stderr and not (tmp_path / "run" / "checkpoints").exists()
    assert ("are of other captions than 4 of 4 shards" if known else "has no embedding of the caption of") in errors[0]


def test_stats_of_a_repaired_sidecar_are_of_its_shard(right, wrong, tmp_path):
    text = Path(shutil.copytree(right / "text", tmp_path / "text"))
    embed(Embed(str(wrong), str(text)))
    check_sidecars(find_shards(wrong), text, 0, 0)
    with pytest.raises(WrongSidecar):
        check_sidecars(find_shards(right / "shards"), text, 0, 0)
    assert stats_path(text / "00000.tar").read_text() != stats_path(right / "text" / "00000.tar").read_text()
