"""The sizes that follow the data, the experiments that use them, and what is told before the start."""

import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.storage.tars import write_shard
from data.text.embeddings import to_bytes
from data.text.meta import TextMeta
from launch.interruptions.from_plan import make_life
from launch.interruptions.options import LifetimeOptions
from model.config import MIN_GROUP_CHANNELS
from tests.support.trainings import launch, make_data, metrics
from train.compose import compose_config, follow_data, sizes_to_set
from train.config import Config
from train.inputs import find_inputs, resolve_sizes
from train.monitor.run_time import MOST_TRIED, describe_time
from train.summary import describe, forwards_beside

OWN = ("own_small", "own_gpu")
# The small net with a level less, and two pictures at a time.
FEWER = ("model=own_small", "model.channel_mult=[1,2]", "model.attention_resolutions=[16]", "micro_batch=2")
SHAPE = (16, 64)
# By experiment and number of samples: steps, optim.warmup_steps, data.streams, save_every, sample.every.
EXPECTED = {
    ("own_small", 1): (1000, 100, 1, 50, 200),
    ("own_small", 50): (1000, 100, 1, 50, 200),
    ("own_small", 400): (2500, 250, 1, 125, 500),
    ("own_small", 1_563): (9800, 980, 6, 490, 1960),
    ("own_small", 12_000): (50_000, 1000, 8, 1000, 10_000),
    ("own_gpu", 50): (1000, 100, 1, 50, 200),
    ("own_gpu", 12_000): (18_800, 1000, 8, 940, 3760),
    ("own_gpu", 1_200_000_000): (50_000, 1000, 8, 1000, 10_000),
}


def values(config: Config) -> tuple[int, ...]:
    return config.steps, config.optim.warmup_steps, config.data.streams, config.save_every, config.sample.every


@pytest.mark.parametrize(("name", "samples"), EXPECTED)
def test_sizes_follow_the_samples(name, samples):
    config = compose_config([f"+experiment={name}"])
    told = follow_data(config, samples)
    assert values(config) == EXPECTED[name, samples] and config.validate_every == 0
    assert config.steps % config.sample.every == 0, "the last grid is not drawn twice"
    assert told.startswith(f"sizes that follow {samples:,} sample") and f"steps={config.steps}, " in told
    assert not sizes_to_set(config) and not follow_data(config, 3), "once: a second call changes nothing"
    assert values(config) == EXPECTED[name, samples]


def test_what_is_given_stays_and_the_rest_follows_it():
    given = ["+experiment=own_small", "steps=60", "data.streams=4", "sample.every=0", "data.validation.share=0.1"]
    config = compose_config(given)
    told = follow_data(config, 400)
    assert (config.steps, config.data.streams, config.sample.every) == (60, 4, 0)
    assert (config.optim.warmup_steps, config.save_every, config.validate_every) == (6, 3, 3)
    assert told == (
        "sizes that follow 400 samples: optim.warmup_steps=6, save_every=3, validate_every=3; 2 visits of each"
    )
    assert follow_data(compose_config(["+experiment=smoke"]), 400) == ""
    # Any experiment may say so.
    config = compose_config(["+experiment=smoke", "steps=-1"])
    assert follow_data(config, 400).endswith("steps=2500; 100 visits of each") and config.save_every == 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("steps=-2",), "steps=-2 must be at least 1"),
        (("save_every=0",), "save_every=0 must be at least 1"),
        (("data.streams=-3",), "data.streams=-3 must be at least 1"),
        (("optim.warmup_steps=1",), "optim.warmup_steps=1 must be at least 2"),
        (("global_batch=-1",), "global_batch=-1 must be at least 1"),
        (("validate_every=9",), "validate_every=9 needs held-out samples"),
    ],
)
def test_no_other_negative_size_is_taken(given, message):
    with pytest.raises(ValueError, match=message):
        compose_config(["+experiment=own_small", *given])


def test_sizes_that_do_not_go_together_are_refused_when_both_are_known():
    config = compose_config(["+experiment=own_small", "optim.warmup_steps=1000"])
    with pytest.raises(ValueError, match=r"optim.warmup_steps=1000 must lie between 2 and 999, one less than steps"):
        follow_data(config, 50)


@pytest.mark.parametrize("model", ["own_small", "own_small_64"])
def test_the_small_nets_see_colours_and_take_the_encoders_there_are(model):
    net = compose_config(["+experiment=own_small", f"model={model}"]).model
    assert net.group_channels >= 2 * MIN_GROUP_CHANNELS
    assert net.image_size == (64 if model.endswith("64") else 32)
    for width in (64, 384, 512, 768, 1024, 2048, 4096):  # the tiny T5, MiniLM, T5 from small to XXL
        assert replace(net, encoder_dim=width).encoder_dim == width


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    keys = [f"{n:09d}" for n in range(12)]
    write_shard(folder / "shards" / "00000.tar", [(key, {"jpg": b"", "txt": b""}) for key in keys])
    states = to_bytes(np.zeros(SHAPE, np.float32))
    write_shard(folder / "text" / "00000.tar", [(key, {"npy": states}) for key in keys])
    TextMeta("none", "0", "0", *SHAPE, "float32", "float32", "none").write(folder / "text")
    (folder / "text" / "empty.npy").write_bytes(states)
    return folder


def own(data: Path, name: str, *given: str) -> Config:
    return compose_config([
        f"+experiment={name}", f"data.shards={data / 'shards'}", f"data.text={data / 'text'}", *given
    ])  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_run_takes_sizes_and_widths_from_its_data_and_tells_them(data, name, caplog, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu" if name == "own_small" else "cuda")
    config = own(data, name, *FEWER)  # of IF-I-M it would take seconds
    with caplog.at_level(logging.INFO, "train"):
        inputs = find_inputs(config)
    assert inputs.sizes in caplog.messages and values(config) == EXPECTED["own_small", 50]
    assert (config.data.tokens, config.model.encoder_dim) == SHAPE, "as meta.json says"
    page = describe(config, 1, inputs)
    assert "1,000, " in page and " memory  about " in page
    assert ("images/s, as one micro batch takes now" if name == "own_small" else "launch.plan") in page


def test_without_data_the_sizes_are_asked_for_and_are_set_by_a_number_that_is_given(tmp_path):
    given = [f"data.shards={tmp_path}", f"data.text={tmp_path}"]
    config = compose_config(["+experiment=own_gpu", *FEWER, *given])
    with pytest.raises(ValueError, match=r"steps, .* follow the number of samples, which is not known"):
        describe(config, 1, None)
    assert resolve_sizes(config, 12_000).startswith("sizes that follow 12,000 samples")
    assert values(config) == EXPECTED["own_gpu", 12_000]


def test_the_pages_tell_the_sizes_and_why_the_number_of_samples_is_assumed(data, tmp_path):
    config = own(data, "own_small", *FEWER)
    assert resolve_sizes(config, 12_000).startswith("sizes that follow 12 samples: steps=1000, ")
    assert resolve_sizes(config, 12_000) == "", "all are set"
    given = [*FEWER, f"data.shards={tmp_path / 'none'}", f"data.text={tmp_path}"]
    small = {"nodes": 1, "gpus_per_node": 1, "samples": 12_000}
    config = compose_config(["+experiment=own_small", *given])
    sizes = make_life(LifetimeOptions(**small), config)[1]
    assert sizes.startswith("sizes that follow 12,000 samples: steps=")
    assert f"(samples=12000 is assumed: no folder '{tmp_path / 'none'}'" in sizes


def test_a_grid_and_a_validation_count_as_passes_of_the_net(data):
    config = own(data, "own_small", "steps=40", "sample.every=15", "sample.prompts=3", "sample.steps=7")
    inputs = find_inputs(config)
    of_grids = 3 * 3 * 7 * (1 + 2)  # three grids with the one at the end, two scales
    assert forwards_beside(config, inputs) == (of_grids, 0)
    config.validate_every, config.sample.every = 10, 0
    assert forwards_beside(config, replace(inputs, held_out=inputs.datasets)) == (3 * 7 * 3, 4 * 8 * 12)


def test_ranks_share_the_images_and_validations_and_the_cores_of_their_node_and_not_the_grids(data, monkeypatch):
    config = own(data, "own_small", "steps=3000", "global_batch=16", *FEWER)
    find_inputs(config)
    monkeypatch.setattr("train.monitor.run_time.MOST_TRIED", math.inf)
    monkeypatch.setattr("train.monitor.run_time.seconds_of_micro_batch", lambda config: float(config.micro_batch))

    def told(nodes: int, of_this_node: int, of_grids: int = 0, of_validations: int = 0) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(nodes * of_this_node))
        monkeypatch.setenv("LOCAL_SIZE", str(of_this_node))
        return describe_time(config, of_grids, of_validations).partition(" images/s")[0]

    # An image takes a second where a rank has all threads.
    assert told(1, 4) == "about 3 h 20 min, 4.0", "each rank has its own threads"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert told(1, 1) == told(1, 4) == "about 13 h 20 min, 1.0" and told(2, 4) == "about 6 h 40 min, 2.0"
    assert told(2, 1, of_validations=3 * 48_000) == "about 13 h 20 min, 2.0"
    assert told(2, 1, of_grids=3 * 48_000) == "about 20 h 0 min, 2.0"
    assert told(1, 4, of_grids=3 * 48_000) == "about 2 d 19 h, 1.0", "the others' cores are idle meanwhile"


def test_the_time_is_tried_without_a_draw_and_only_where_it_is_short(data, monkeypatch):
    config = own(data, "own_small", *FEWER)
    find_inputs(config)
    before = torch.random.get_rng_state()
    assert "images/s, as one micro batch takes now on this CPU" in describe_time(config, 0, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setattr("train.monitor.run_time.MOST_TRIED", MOST_TRIED / 1e6)
    assert describe_time(config, 0, 0) == "not tried here: a micro batch takes 0.0 TFLOP"


@pytest.mark.slow
def test_a_short_run_of_own_small_and_the_same_command_again(repo, tmp_path):
    data, run_dir = make_data(tmp_path / "data"), tmp_path / "run"
    command = [
        sys.executable, "train/main.py", "+experiment=own_small", f"data.shards={data / 'shards'}",
        f"data.text={data / 'text'}", f"run_dir={run_dir}", "sample.steps=2", "sample.prompts=2", "log_every=1",
    ]  # fmt: skip

    def run(*given: str) -> str:
        done = subprocess.run([*command, *given], cwd=repo, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run("steps=10")
    assert "sizes that follow 96 samples: optim.warmup_steps=2, data.streams=1, save_every=1" in first
    assert " time  about " in first and " memory  about " in first
    assert sorted(file.name for file in (run_dir / "samples").iterdir()) == [
        f"step-{step:08d}.png" for step in range(2, 11, 2)
    ]
    again = run("steps=12")
    assert "resumes from step 10" in again and " time  about " not in again, "told once, at the beginning"
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 13))


@pytest.mark.slow
def test_two_ranks_agree_on_the_sizes(repo, tmp_path):
    """Ranks that did not would deal other samples, and hang at the collectives of another interval."""
    data = make_data(tmp_path / "data")
    sized = ("steps=6", "optim.warmup_steps=-1", "save_every=-1", "sample.every=-1", "data.streams=-1")
    done = launch(repo, data, tmp_path / "run", *sized, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sizes that follow 96 samples") == 1
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 6
