"""What a run may go on with: the same data by its content, the same net; what changed is told, kept and shown."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data import demo
from data.cli import keys
from data.embed import Embed, embed
from data.index import Index, index
from data.loader.dataset import Dataset
from data.storage.shards import Shard, find_shards
from data.storage.tars import STATS
from data.text.meta import TextMeta
from tests.checkpoints import write_manifest
from tests.support.trainings import free_port, launch, make_data, metrics
from train.checkpoint.changes import describe_changes, find_changes, learning_rate, rate_change, show
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import MANIFEST, SEAL, CheckpointFailed, latest_checkpoint, part_file, sealed
from train.checkpoint.identity import DataIdentity, add_missing_digests, data_digest, identity, weights_digest
from train.checkpoint.resume import check_resumable, find_history, resume
from train.compose import compose_config
from train.config import Config, OptimConfig
from train.engine import one_cycle
from train.faults.spikes import SpikeMemory
from train.report import Report, write_report
from train.weights.model_card import model_card

ROOT = Path(__file__).resolve().parent.parent
TEXT = TextMeta("none", "0", "0", 16, 64, "float32", "float32", "if-1")
DATA = DataIdentity([10], ["d" * 32], TEXT)
USUAL = ("+experiment=smoke", "data.mixture.a.shards=a", "data.mixture.a.text=b", "init_from=weights")


def load(run_dir: Path, *overrides: str) -> Config:
    return compose_config([*USUAL, f"run_dir={run_dir}", *overrides])


def write_step(config: Config, step: int = 4, data: DataIdentity = DATA) -> Path:
    """A checkpoint of a run as far as check_resumable and find_history read it."""
    folder = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    described = {"step": step, "schedule_step": step, "ranks": 1, "parameters": {}, "changes": []}
    return write_manifest(folder, described | data.entries() | {"config": asdict(config)})


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed=0, now it is 1"),
        ("global_batch=32", "global_batch=16, now it is 32"),
        ("diffusion_steps=500", "diffusion_steps=1000, now it is 500"),
        ("model.activation=gelu_3bit", "model.activation=gelu, now it is gelu_3bit"),
        ("model.norm_groups=4", "model.norm_groups=8, now it is 4"),
        ("data.streams=2", "data.streams=4, now it is 2"),
        ("data.phases=2", "data.phases=1, now it is 2"),
        ("data.shuffle_block=64", "data.shuffle_block=128, now it is 64"),
        ("data.mixture.a.weight=2", "data.mixture={'a': 1.0}, now it is {'a': 2.0}"),
        ("lora.rank=4", "lora=None, now it is {'rank': 4"),
    ],
)
def test_what_may_not_change_on_the_way_is_named(tmp_path, override, key):
    write_step(load(tmp_path / "run"))
    with pytest.raises(ValueError) as error:
        check_resumable(load(tmp_path / "run", override), DATA)
    assert f"was trained with {key}" in str(error.value) and "or choose another run_dir" in str(error.value)


def test_what_was_no_key_yet_had_its_default(tmp_path):
    wide = "model.model_channels=128"
    folder = write_step(load(tmp_path / "run", wide, "model.norm_groups=32"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["config"]["model"]["norm_groups"], manifest[SEAL]
    write_manifest(folder, manifest)
    check_resumable(load(tmp_path / "run", wide, "model.norm_groups=32"), DATA)
    with pytest.raises(ValueError, match=r"model\.norm_groups=32, now it is 8"):
        check_resumable(load(tmp_path / "run", wide), DATA)


def test_power_function_averages_begin_with_the_first_step_or_never(tmp_path):
    write_step(load(tmp_path / "without"))
    with pytest.raises(ValueError, match=r"has no power-function averages, .*ema_snapshot_every=0"):
        check_resumable(load(tmp_path / "without", "ema_snapshot_every=5"), DATA)
    write_step(load(tmp_path / "with", "ema_snapshot_every=5"))
    for every in (0, 5, 7):
        check_resumable(load(tmp_path / "with", f"ema_snapshot_every={every}"), DATA)


def test_all_else_may_change_on_the_way(tmp_path):
    write_step(load(tmp_path / "run"))
    other = ("data.mixture.a.shards=c", "recompute=blocks", "optim.name=adamw", "micro_batch=4", "lora.alpha=3")
    check_resumable(load(tmp_path / "run", *other), DATA)
    check_resumable(load(tmp_path / "run", "steps=4", "optim.warmup_steps=2"), DATA)
    with pytest.raises(ValueError, match="is beyond steps=3"):
        check_resumable(load(tmp_path / "run", "steps=3", "optim.warmup_steps=2"), DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": [11]}, "was trained on other data ([10] samples, data.mixture.a.shards now has [11])"),
        ({"digests": ["e" * 32]}, "was trained on other data (its digest dddddddddddd, that of data.mixture.a.shards"),
        ({"text": replace(TEXT, cleaning="if-2")}, "other embeddings (their meta.json: cleaning if-1, now if-2)"),
        ({"text": replace(TEXT, weights_sha256="1")}, "other embeddings (their meta.json: weights_sha256 0, now 1)"),
        ({"text": replace(TEXT, tokens=32)}, "other embeddings (their meta.json: tokens 16, now 32)"),
        ({"base": "f" * 64}, "on other weights than those that init_from=weights has now"),
    ],
)
def test_other_contents_are_refused(tmp_path, change, message):
    write_step(load(tmp_path / "run"))
    with pytest.raises(ValueError) as error:
        check_resumable(load(tmp_path / "run"), replace(DATA, **change))
    assert message in str(error.value) and "or begin from scratch in another run_dir" in str(error.value)


def test_data_that_grew_are_told_before_the_sizes_that_follow_them(tmp_path):
    write_step(load(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"was trained on other data \(\[10\] samples, .* now has \[900\]\)"):
        check_resumable(load(tmp_path / "run", "data.streams=6"), replace(DATA, samples=[900], digests=["e" * 32]))
    two = load(tmp_path / "run", "data.mixture.b.shards=a", "data.mixture.b.text=b")
    with pytest.raises(ValueError, match=r"was trained with data\.mixture={'a': 1\.0}, now it is {'a': 1\.0, 'b'"):
        check_resumable(two, DataIdentity([10, 10], ["d" * 32] * 2, TEXT))


def test_another_selection_is_refused_with_what_was_chosen_then_and_now(tmp_path):
    of_a, of_b = ({"digest": d * 32, "receipt": [f"where {d} > 1 leaves out 3"]} for d in "ab")
    config = load(tmp_path / "run")
    check = partial(check_resumable, config)
    write_step(config, data=replace(DATA, selections=[of_a]))
    check(replace(DATA, selections=[of_a]))
    check(replace(DATA, selections=[of_a | {"receipt": ["the same rows by other rules"]}]))
    with pytest.raises(
        ValueError, match=r"another selection of data.mixture.a.shards \(where a > 1 leaves out 3\), now"
    ):
        check(replace(DATA, samples=[9], selections=[of_b]))
    with pytest.raises(ValueError, match="all samples are chosen"):
        check(replace(DATA, selections=[None]))
    with pytest.raises(ValueError, match="on other data"):
        check(replace(DATA, digests=["e" * 32], selections=[of_b]))


def test_the_card_of_an_export_has_what_the_rules_took_and_no_path_of_a_list(tmp_path):
    config = load(
        tmp_path / "run", "data.where=a > 1", "data.drop=secret/removed.csv", "data.mixture.a.drop=secret/b.txt"
    )
    receipt = ["where a > 1 leaves out 3", "drop removed.csv by url leaves out 2", "10 of 15 samples are chosen"]
    folder = write_step(config, data=replace(DATA, selections=[{"digest": "a", "receipt": receipt}]))
    card = model_card(Checkpoint.read(folder), "x", "ema", "mit", has_encoder=False).text
    chosen = "".join(f"\n  - `{line}`" for line in receipt)
    assert f"- `a`: 10 captioned images, chosen by rules:{chosen}\n" in card and "where: a > 1" in card
    assert "secret" not in card


def test_a_checkpoint_from_before_selections_goes_on_with_all_samples(tmp_path):
    config = load(tmp_path / "run")
    folder = write_step(config)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["selections"], manifest[SEAL]
    for key in ("where", "drop", "validation"):
        del manifest["config"]["data"][key]
    write_manifest(folder, manifest)
    check_resumable(config, replace(DATA, selections=[None]))
    with pytest.raises(ValueError, match=r"\(all samples are chosen\), now it is another \(x\)"):
        check_resumable(config, replace(DATA, selections=[{"digest": "a", "receipt": ["x"]}]))


def test_where_the_encoder_lies_is_not_compared(tmp_path):
    write_step(load(tmp_path / "run"))
    moved = replace(TEXT, encoder="elsewhere", dtype="float16", compute="bfloat16")
    check_resumable(load(tmp_path / "run"), replace(DATA, text=moved))


def test_the_order_of_a_mixture_may_not_change(tmp_path):
    two = ("data.mixture.b.shards=a", "data.mixture.b.text=b")
    write_step(load(tmp_path / "run", *two), data=DataIdentity([10, 10], ["d" * 32] * 2, TEXT))
    config = load(tmp_path / "run", *two)
    config.data.mixture = dict(reversed(config.data.mixture.items()))
    with pytest.raises(ValueError, match=r"data\.mixture={'a': 1\.0, 'b': 1\.0}, now it is {'b': 1\.0, 'a': 1\.0}"):
        check_resumable(config, DataIdentity([10, 10], ["d" * 32] * 2, TEXT))


def test_a_digest_of_data_follows_from_counts_captions_and_order_alone():
    one, two = Shard("a/0.tar", 3, digest="11"), Shard("a/1.tar", 4, digest="22")
    whole = data_digest(Dataset([one, two], "text"))
    moved = [replace(one, location="s3://b/x.tar", size=5), replace(two, location="c/y.tar")]
    assert data_digest(Dataset(moved, "other", 2.0)) == whole and len(whole) == 32
    for shards in ([two, one], [one], [one, replace(two, count=5)], [one, replace(two, digest="23")]):
        assert data_digest(Dataset(shards, "text")) != whole


def test_shards_without_a_digest_are_read_once_and_the_remedy_is_named(tmp_path, caplog):
    shards = tmp_path / "shards"
    demo.main([f"out={shards}", "samples=8", "shard_size=4"])
    expected = data_digest(Dataset(find_shards(shards), ""))
    for stats in shards.glob(f"*{STATS}"):  # as img2dataset writes them
        stats.write_text(json.dumps({"successes": json.loads(stats.read_text())["successes"]}))
    dataset = Dataset(find_shards(shards), "")
    assert expected and not any(shard.digest for shard in dataset.shards)
    add_missing_digests([dataset])
    assert data_digest(dataset) == expected
    assert f"2 of 2 shards in '{shards}' have no digest yet" in caplog.text
    assert f"run `python -m data.index shards={shards}` to make this once" in caplog.text
    caplog.clear()
    index(Index(str(shards), workers=1))
    dataset = Dataset(find_shards(shards), "")
    add_missing_digests([dataset])
    assert data_digest(dataset) == expected and not caplog.text


def test_a_digest_of_weights_sees_every_bit_name_and_dtype():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({name: value.t() if name == "a" else value for name, value in weights.items()}) != digest
    assert weights_digest({name: value.bfloat16() for name, value in weights.items()}) != digest
    assert weights_digest({"a": weights["a"], "c": weights["b"]}) != digest
    changed = weights["a"].clone()
    changed[1, 2] = changed[1, 2].nextafter(torch.tensor(9.0))
    assert weights_digest(weights | {"a": changed}) != digest


def test_the_rate_is_that_of_the_schedule_of_a_training():
    config = {"steps": 20, "optim": asdict(OptimConfig(lr_start=1e-4, lr_peak=1e-3, lr_end=1e-6, warmup_steps=5))}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = one_cycle(optimizer, OptimConfig(**config["optim"]), 20)
    for step in range(20):
        assert learning_rate(config, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("change", "step", "words"),
    [
        # The schedule before has ended; by hand, 1e-6 + (5e-3 - 1e-6) x (1 + cos(7/8 pi)) / 2 = 1.9e-4.
        ({"steps": 10, "lr_peak": 5e-3}, 8, "the learning rate jumps from 1e-6 to 1.9e-4"),
        ({"lr_peak": 2e-4}, 1, "the learning rate falls from 1e-3 to 2e-4"),
        ({"lr_peak": 1.2e-3}, 1, "the learning rate goes from 1e-3 to 1.2e-3"),
        ({"weight_decay": 0.5}, 3, ""),
        ({"steps": 8, "lr_peak": 5e-3}, 8, ""),  # there is no further step
    ],
)
def test_a_leap_of_the_rate_is_computed(change, step, words):
    optim = OptimConfig(lr_start=1e-4, lr_peak=1e-3, lr_end=1e-6, warmup_steps=2)
    before = {"steps": 8, "optim": asdict(optim)}
    steps = change.pop("steps", 8)
    now = {"steps": steps, "optim": asdict(replace(optim, **change))}
    assert rate_change(before, now, step) == words


def test_changes_are_told_in_one_line_and_added_to_those_before(tmp_path):
    small = ("steps=8", "optim.lr_peak=1e-3", "optim.lr_start=1e-4", "optim.lr_end=1e-6", "optim.warmup_steps=2")
    config = load(tmp_path / "run", *small)
    checkpoint = Checkpoint.read(write_step(config, 8))
    assert find_history(checkpoint, config, DATA, 1) == ([], "resumes from step 8: all 8 steps are already made")
    other = load(tmp_path / "run", *small, "optim.lr_peak=5e-3", "steps=10", "dry_run=true", "init_from=x")
    checkpoint.manifest["changes"] = [{"step": 3, "changes": {"seconds": [1, 2]}}]
    history, line = find_history(checkpoint, other, DATA, 1)
    assert line == (
        "resumes from step 8 with optim.lr_peak 1e-3 -> 5e-3, steps 8 -> 10: "
        "the learning rate jumps from 1e-6 to 1.9e-4"
    )
    now = {"step": 8, "changes": {"optim.lr_peak": [1e-3, 5e-3], "steps": [8, 10]}}
    assert history == [{"step": 3, "changes": {"seconds": [1, 2]}}, now]
    moved = replace(DATA, text=replace(TEXT, dtype="float16"))
    assert find_history(checkpoint, config, moved, 2)[1] == (
        "resumes from step 8 with embeddings.dtype float32 -> float16, ranks 1 -> 2: all 8 steps are already made"
    )


def test_values_are_short():
    shown = [show(value) for value in (1e-3, 5e-9, 0.9999, 0.5, 0.0, float("nan"), 3, "", None, True, "x" * 99)]
    assert shown == ["1e-3", "5e-9", "0.9999", "0.5", "0", "nan", "3", "none", "none", "True", "x" * 57 + "..."]
    assert describe_changes(find_changes({"a": {"b": 1}, "c": [1, 2]}, {"a": {"b": 2}, "d": 1})) == (
        "a.b 1 -> 2, c [1, 2] -> none, d none -> 1"
    )


@pytest.fixture
def alone():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_anew(tmp_path, alone, capsys):
    config = load(tmp_path / "run")
    for step in (4, 8):
        (write_step(config, step) / "manifest.json").write_text("{")
    for attempt in range(2):  # the second time they have been renamed
        with pytest.raises(
            CheckpointFailed, match="is damaged: choose another run_dir to begin from scratch, or delete that"
        ):
            resume(config, DATA, None, None)
        assert capsys.readouterr().err.count("DAMAGED CHECKPOINT") == (0 if attempt else 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert resume(config, DATA, None, None) == (0, [], SpikeMemory())


def test_a_fault_of_the_machine_is_no_damage(tmp_path, alone):
    config = load(tmp_path / "run")
    write_step(config, 4)
    folder, name = write_step(config, 8), part_file(0)
    (folder / name).symlink_to("/proc/self/mem")  # whose first byte gives EIO, as a broken disk does
    manifest = json.loads((folder / MANIFEST).read_text()) | {"files": {name: 0}, "sha256": {name: "0"}}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointFailed) as error:
        resume(config, DATA, None, None)
    assert f"the checkpoint '{folder}' cannot be read (" in str(error.value) and folder.exists()
    assert "Input/output error" in str(error.value) and "which is no damage of it" in str(error.value)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoint.open(config.run_dir)


def test_the_docs_say_of_every_key_whether_it_may_change():
    page = (ROOT / "docs/reference/checkpoints.md").read_text()
    table = page.partition("## What may change on a resume")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    documented = {key.strip(" `"): may.strip() for names, may, _ in rows for key in names.split(", ")}
    fixed = set(identity(asdict(Config())))
    for key in (name for name, *_ in keys(Config)):
        rule = next(
            (k for k in (key, f"{key.partition('.')[0]}.*", f"{key.rpartition('.')[0]}.*") if k in documented), None
        )
        assert rule, f"{key} is not in the table"
        assert documented[rule] == ("no" if key in fixed or key.startswith("lora.") else documented[rule]), key
        assert documented[rule] == "no" or key not in fixed, key


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_run_goes_on_with_a_changed_recipe_and_says_so_and_not_with_other_data(repo, data, tmp_path):
    run_dir = tmp_path / "run"
    short = ("wandb.mode=disabled", "steps=4", "save_every=4", "data.workers=0")
    done = launch(repo, data, run_dir, *short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumes from" not in done.stdout
    # Other pictures and captions of the same counts, and their embeddings.
    other = tmp_path / "other"
    demo.main([f"out={other / 'shards'}", "samples=96", "shard_size=24", "seed=1"])
    embed(Embed(str(other / "shards"), str(other / "text"), str(data / "t5"), 16, "float32", "float32"))
    longer = ("wandb.mode=disabled", "steps=6", "save_every=4", "data.workers=0", "optim.lr_peak=5e-3")
    done = launch(repo, other, run_dir, *longer)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr[-3000:]
    assert "was trained on other data (its digest " in done.stderr and "give it the same shards" in done.stderr
    # The same data in another place, its shards under other names.
    moved = tmp_path / "moved"
    for kind in ("shards", "text"):
        (moved / kind).mkdir(parents=True)
        for file in (data / kind).iterdir():
            shutil.copy2(file, moved / kind / (f"x{file.name}" if file.name[0] == "0" else file.name))
    done = launch(repo, moved, run_dir, *longer)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("resumes from step 4 with data.shards ")]
    assert "optim.lr_peak 1e-3 -> 5e-3" in line and "steps 4 -> 6: the learning rate jumps from 1e-6 to " in line
    told = float(line.rpartition(" ")[2])
    assert metrics(run_dir)[4]["lr"] == pytest.approx(told, rel=0.05), "the rate of step 5 is the one that is told"
    # It is kept with the weights, shown by the report, and stands in the card of an export.
    checkpoint = Checkpoint.open(latest_checkpoint(run_dir))
    (change,) = checkpoint.manifest["changes"]
    assert change["step"] == 4 and change["changes"]["optim.lr_peak"] == [1e-3, 5e-3]
    card = model_card(checkpoint, "x", "ema", "mit", has_encoder=False).text
    assert "- from step 5 on: optim.lr_peak 1e-3 -> 5e-3, steps 4 -> 6\n" in card and str(tmp_path) not in card
    write_report(Report([str(run_dir)], str(tmp_path / "out.html")))
    page = (tmp_path / "out.html").read_text()
    assert "<th>optim.lr_peak</th><td>0.001; from step 5 on: 0.005</td>" in page
