"""Weights and encoders of the hub: found by name and revision, kept to their commit, read from the cache without it."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from data.storage.hub import HubName, hub_name, pinned
from data.text.encoder import TextEncoder, _not_loaded, load_encoder
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from tests.checkpoints import random_net, write_run
from tests.support.hub_server import Hub, Repo
from train.config import Config, LoRAConfig
from train.evaluation.evaluated_net import open_nets
from train.inputs import Inputs, pin_init_from
from train.weights.pretrained import load_pretrained

CPU = torch.device("cpu")
NET = UNetConfig(
    image_size=16, model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[], norm_groups=8,
    num_head_channels=32, encoder_dim=48, encoder_channels=64, att_pool_heads=1,
)  # fmt: skip
FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> dict[str, bytes]:
    """The files of an encoder."""
    folder = tmp_path_factory.mktemp("pull") / "t5"
    write_tiny_t5(TinyT5(out=str(folder), dim=48))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def encoders(hub, t5) -> Repo:
    repo = hub.repos["org/t5"] = Repo()
    repo.commit(t5 | {"README.md": b"first"})
    return repo


def away(monkeypatch) -> None:
    """From now on nothing listens where the hub was."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )


def weights(seed: int) -> dict[str, Tensor]:
    return random_net(NET, seed).state_dict()


def on_hub(hub: Hub, tmp_path: Path, seed: int, **files: bytes) -> str:
    """A repository org/net whose weights are random_net(seed). Returns the commit."""
    save_file(weights(seed), tmp_path / "w.safetensors")
    repo = hub.repos.setdefault("org/net", Repo())
    return repo.commit({FILE: (tmp_path / "w.safetensors").read_bytes(), "unet/config.json": b"{}", **files})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fetched(hub: Hub) -> list[str]:
    """The files that were downloaded."""
    return [path.split("/", 5)[5] for method, path in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("org/net", HubName("org/net")),
        ("org/net@v1.0", HubName("org/net", "v1.0")),
        ("org/net@refs/pr/3", HubName("org/net", "refs/pr/3")),
        ("t5-small", None),
        ("./net", None),
        ("/data/net", None),
        ("a/b/c", None),
        ("s3://bucket/net", None),
        ("org/net@", None),
        ("../org", None),
    ],
)
def test_what_is_a_name_on_the_hub(location, name):
    assert hub_name(location) == name


def test_a_folder_that_is_there_comes_first(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/net") is None and pinned("org/net") == "org/net"
    assert hub_name("org/net@main") == HubName("org/net", "main"), "a revision is the hub's"
    assert hub_name("t5-small", bare=True) == HubName("t5-small")
    assert not hub.requests


def test_an_encoder_is_recorded_with_its_commit_and_found_again_without_the_hub(hub, encoders, monkeypatch, caplog):
    first = encoders.branches["main"]
    encoder = TextEncoder("org/t5", 20, "float32", CPU)
    meta = encoder.meta("float16")
    assert meta.encoder == encoder.name == f"org/t5@{first}"
    encoders.commit({"README.md": b"gone"})
    away(monkeypatch)
    again = load_encoder(meta)
    np.testing.assert_array_equal(again(["a cat"]), encoder(["a cat"]))
    assert load_encoder(meta, "org/t5").name == meta.encoder
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert TextEncoder("org/t5", 20, "float32", CPU).name == meta.encoder
    assert f"org/t5 is commit {first} of its cache" in caplog.text


def test_of_an_encoder_only_what_is_read_is_fetched(hub, encoders, t5):
    more = {"pytorch_model.bin": b"x", "tf_model.h5": b"x", "onnx/model.json": b"x", "model.fp16.safetensors": b"x"}
    encoders.commit(t5 | more)
    TextEncoder("org/t5@main", 20, "float32", CPU)
    assert sorted(fetched(hub)) == sorted(t5)


def test_a_cache_of_another_program_serves_where_the_hub_does_not(hub, encoders, t5, tmp_path, monkeypatch, caplog):
    """Without the list of the files that a repository has, what is there is taken, and said."""
    commit = encoders.branches["main"]
    TextEncoder("org/t5", 20, "float32", CPU)
    shutil.copytree(tmp_path / "hub", tmp_path / "without", symlinks=True, ignore=shutil.ignore_patterns("trees"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "without"))
    away(monkeypatch)
    assert TextEncoder(f"org/t5@{commit}", 20, "float32", CPU).name == f"org/t5@{commit}"
    assert f"so model.safetensors of org/t5@{commit} is taken from its cache" in caplog.text


def test_a_main_that_has_moved_is_told_and_the_commit_of_the_embeddings_kept(hub, encoders, t5, tmp_path, caplog):
    first = encoders.branches["main"]
    meta = TextEncoder("org/t5", 20, "float32", CPU).meta("float16")
    write_tiny_t5(TinyT5(out=str(tmp_path / "another"), dim=48, seed=5))
    second = encoders.commit({path.name: path.read_bytes() for path in (tmp_path / "another").iterdir()})
    assert load_encoder(meta, "org/t5").name == f"org/t5@{first}"
    assert f"main of org/t5 on the hub has moved to commit {second}; org/t5@{first} is taken, as before" in caplog.text
    with pytest.raises(ValueError, match=f"'org/t5@{second}' is another encoder than the one that the captions were"):
        load_encoder(meta, f"org/t5@{second}")
    meta.encoder = "org/t5"  # as meta files were before commits were recorded
    with pytest.raises(ValueError, match="has changed since, with its earlier commit, org/t5@COMMIT"):
        load_encoder(meta)
    meta.encoder = "elsewhere/t5"
    assert load_encoder(meta, f"org/t5@{first}").name == f"org/t5@{first}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/none", "the hub has no org/none, or it is private and no token"),
        ("org/t5@v9", "org/t5 on the hub has no branch, tag or commit 'v9'"),
        ("org/secret", "the hub has no org/secret, or it is private and no token"),
        ("org/gated", "the hub gives org/gated only to those who accept its conditions"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(hub, encoders, name, told):
    hub.repos |= {"org/secret": Repo(private=True), "org/gated": Repo(gated=True)}
    for repo in ("org/secret", "org/gated"):
        hub.repos[repo].commit({FILE: b"", "unet/config.json": b"{}"})
    with pytest.raises(ValueError) as caught:
        load_pretrained(name, NET)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"no weights at '{Path(name).absolute()}', nor of that name in the hub's cache")


def test_an_encoder_that_came_and_does_not_load_is_not_called_missing(hub, encoders):
    encoders.commit({"model.safetensors": b"damaged", "config.json": b"{"})
    with pytest.raises(ValueError, match=r"the encoder 'org/t5@.*' cannot be loaded \((?!there is no such folder)"):
        TextEncoder("org/t5", 20, "float32", CPU)
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(there is no such folder, it is not in the hub's cache, and"
    ):
        TextEncoder("org/none", 20, "float32", CPU)
    assert "(OSError):" in str(_not_loaded("org/t5", OSError()))


def test_released_weights_of_the_hub_are_evaluated_at_one_commit(hub, tmp_path):
    commit = on_hub(hub, tmp_path, 1)
    assert open_nets("org/net", "scenes", []) == [f"org/net@{commit}"]
    assert open_nets("org/net@main", "scenes", []) == [f"org/net@{commit}"]
    with pytest.raises(ValueError, match=r"no weights at '.*org/none', nor .* and the hub has no org/none, .*: name a"):
        open_nets("org/none", "scenes", [])


def test_a_token_that_the_hub_does_not_know_is_told_and_not_shown(hub, encoders, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    with pytest.raises(ValueError, match="the hub does not allow this for org/t5 with this token") as caught:
        TextEncoder("org/t5", 20, "float32", CPU)
    assert "secret" not in str(caught.value)


def test_a_mistyped_path_of_two_parts_is_told_as_a_path_where_there_is_no_hub(hub, tmp_path, monkeypatch):
    away(monkeypatch)
    place = re.escape(str(Path("runs/typo").absolute()))
    told = rf"no weights at '{place}', nor .*, and the hub is not reached \(ConnectError\): name a file or folder"
    config = Config(run_dir=str(tmp_path), model=NET, init_from="runs/typo")
    text = TextMeta("t5", "0", "0", 77, 48, "float16", "float32", "if-1")
    for find in (
        lambda: pin_init_from(config, Inputs([], text)),
        lambda: load_pretrained("runs/typo", NET),
        lambda: open_nets("runs/typo", "scenes", []),
    ):
        with pytest.raises(ValueError, match=told):
            find()
    with pytest.raises(ValueError, match=r"no weights at '/none/of/these': name a file or folder"):
        open_nets("/none/of/these", "scenes", [])


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    """It takes the connection and answers nothing, for which huggingface_hub's client has no limit."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
        for load in (lambda: load_pretrained("org/net", NET), lambda: TextEncoder("org/t5", 20, "float32", CPU)):
            with pytest.raises(ValueError, match=r"the hub does not answer within 0\.2 seconds"):
                load()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nor of that name in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_pretrained("org/net", NET)


def test_weights_of_a_revision_are_fetched_and_nothing_else_is(hub, tmp_path, monkeypatch):
    first = on_hub(hub, tmp_path, 1, **{
        "unet/diffusion_pytorch_model.bin": b"x", "unet/diffusion_pytorch_model.fp16.safetensors": b"x",
        "text_encoder/model.safetensors": b"x", "README.md": b"x",
    })  # fmt: skip
    hub.repos["org/net"].branches["v1"] = first
    on_hub(hub, tmp_path, 2)
    assert same(load_pretrained("org/net@v1", NET), weights(1))
    assert sorted(fetched(hub)) == ["unet/config.json", FILE]
    assert same(load_pretrained("org/net", NET), weights(2)), "main is another commit"
    away(monkeypatch)
    for name, seed in (("org/net@v1", 1), (f"org/net@{first}", 1), ("org/net", 2)):
        assert same(load_pretrained(name, NET), weights(seed)), "all is in the cache"


def test_a_copy_of_less_precision_in_the_cache_is_not_taken_for_the_weights(hub, tmp_path):
    half = {name: value.half() for name, value in weights(1).items()}
    save_file(half, tmp_path / "half.safetensors")
    files = {"unet/diffusion_pytorch_model.fp16.safetensors": (tmp_path / "half.safetensors").read_bytes()}
    commit = on_hub(hub, tmp_path, 1, **files)
    snapshot_download("org/net", revision=commit, allow_patterns=["*fp16*"])
    assert same(load_pretrained(f"org/net@{commit}", NET), weights(1))


def test_shards_are_fetched_by_their_index(hub, tmp_path):
    state, names = weights(3), sorted(weights(3))
    files, places = {}, {}
    for i, part in enumerate((names[:20], names[20:])):
        save_file({name: state[name] for name in part}, tmp_path / "s")
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        files[f"unet/{file}"] = (tmp_path / "s").read_bytes()
        places |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": places}).encode()
    hub.repos["org/net"] = Repo()
    hub.repos["org/net"].commit(files | {f"{FILE}.index.json": index, "unet/other.safetensors": b"x"})
    assert same(load_pretrained("org/net", NET), state)
    assert sorted(fetched(hub)) == sorted([*files, f"{FILE}.index.json"])


def test_a_repository_without_weights_names_what_is_looked_for(hub):
    hub.repos["org/net"] = Repo()
    hub.repos["org/net"].commit({"README.md": b"x"})
    with pytest.raises(ValueError, match=r"org/net@\w{40} holds none of the 24 files of weights"):
        load_pretrained("org/net", NET)


def test_a_run_keeps_to_the_commit_that_it_began_with(hub, tmp_path, caplog):
    """What a run records in its configuration names the commit, also after it resumes and the branch has moved."""
    first = on_hub(hub, tmp_path, 1)
    (tmp_path / "text").mkdir()
    TextMeta("t5", "0", "0", 77, 48, "float16", "float32", "if-1").write(tmp_path / "text")
    text = TextMeta.read(tmp_path / "text")
    whole = Config(run_dir=str(tmp_path / "whole"), model=NET, init_from="org/net")
    lora = Config(run_dir=str(tmp_path / "lora"), model=NET, init_from="org/net", lora=LoRAConfig(rank=4))
    for config, from_weights in ((whole, True), (lora, False)):
        found = Inputs([], text)
        pin_init_from(config, found)
        assert config.init_from == f"org/net@{first}" and found.from_weights == from_weights
        write_run(Path(config.run_dir), NET, tmp_path / "text", init_from=config.init_from)
    second = on_hub(hub, tmp_path, 2)
    for config in (whole, lora):
        asked = len(hub.requests)
        config.init_from, found = "org/net@main", Inputs([], text)
        pin_init_from(config, found)
        assert config.init_from == f"org/net@{first}" and not found.from_weights
        assert (len(hub.requests) > asked) == (config is lora), "weights that are not read need no hub"
    assert f"main of org/net on the hub has moved to commit {second}" in caplog.text
    lora.init_from = f"org/net@{second}"
    pin_init_from(lora, Inputs([], text))
    assert lora.init_from == f"org/net@{second}"
