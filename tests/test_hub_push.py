"""train.export push_to=: what is refused before the export, what is sent, and that the same command goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Response
from huggingface_hub import ModelCard

from data.storage.hub import HubName
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.checkpoints import changed_run, write_run
from tests.support.hub_server import Hub, Repo, refusal
from tests.test_export import NET, write_meta
from train.checkpoint.format import step_folder
from train.export import main
from train.weights.push import Destination, make

SMALL = replace(NET, model_channels=32, channel_mult=[1], attention_resolutions=[], norm_groups=8, att_pool_heads=1)
TOKEN, REPO = "hf_secretsecret", "me/net"
CARD_ONLY = {"README.md": b"---\nlicense: mit\n---\nmine"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run, the same one a step later, and an export of the first; their embeddings' encoder is not here."""
    base = tmp_path_factory.mktemp("push")
    (base / "text").mkdir()
    TextMeta("gone/t5", "0", "0", 77, NET.encoder_dim, "float16", "float32", "if-1").write(base / "text")
    write_run(base / "run", SMALL, base / "text")
    changed_run(base / "run", base / "later", lambda manifest: manifest.update(step=8))
    push(base, base / "net", push_to="")
    return base


@pytest.fixture
def me(hub, monkeypatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add_user(TOKEN, "me", team="write", readers="read")
    return hub


def push(base: Path, out: Path, run: str = "run", **given: str) -> None:
    given = {"checkpoint": str(base / run), "out": str(out), "push_to": REPO, "license": "mit"} | given
    main([f"{key}={value}" for key, value in given.items()])


def head(hub: Hub, name: str = REPO) -> dict[str, bytes]:
    return hub.repos[name].commits[hub.repos[name].branches["main"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sends(hub: Hub) -> list[tuple[str, str]]:
    """The requests that change something; the hub is asked by POST for its opinion too."""
    asked = ("/api/validate-yaml", "/preupload/", "/objects/batch")
    return [(m, path) for m, path in hub.requests if m != "GET" and m != "HEAD" and not any(a in path for a in asked)]


def test_a_push_makes_a_private_repository_of_the_folder_and_its_repetition_sends_nothing(base, me, tmp_path, capsys):
    push(base, tmp_path / "if")
    assert me.repos[REPO].private
    assert {name: data for name, data in head(me).items() if name != ".gitattributes"} == contents(tmp_path / "if")
    card = ModelCard(head(me)["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert card.data.to_dict()["training"]["step"] == 7 and 'from_pretrained("me/net"' in card.text
    told = capsys.readouterr()
    assert f"me/net (private, new): {len(head(me)) - 1} files" in told.out
    before, written = sends(me), (tmp_path / "if" / "model_index.json").stat().st_mtime_ns
    push(base, tmp_path / "if")
    assert sends(me) == before and (tmp_path / "if" / "model_index.json").stat().st_mtime_ns == written
    told_again = capsys.readouterr()
    assert "0 to send, 0 bytes" in told_again.out
    assert "secret" not in told.out + told.err + told_again.out + told_again.err
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not kept, "no token on the disk"


def test_a_push_that_broke_off_goes_on_with_what_is_missing(base, me, tmp_path, capsys):
    out = shutil.copytree(base / "net", tmp_path / "net")
    for name in ("a", "b"):
        (out / f"{name}.safetensors").write_bytes(name.encode())
    puts = []

    def before(method: str, path: str) -> Response | None:
        """Of the large files, which are sent side by side, the first one is taken."""
        if method != "PUT":
            return None
        puts.append(path)
        return refusal(403, "no more of it") if len(puts) > 1 else None

    me.before = before
    with pytest.raises(SystemExit) as caught:
        push(base, out)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.splitlines()[-1].startswith("error: the upload to me/net did not end (")
    assert "the same command goes on with it" in told and "secret" not in told
    assert len(me.uploads) == 1 and set(head(me)) == {".gitattributes"}
    me.before = lambda method, path: None
    push(base, out)
    assert len(me.uploads) == len(set(me.uploads)) == 3, "the first file is not sent again"
    assert head(me).items() >= contents(out).items()


def test_a_dry_run_lists_the_files_with_their_sizes_and_sends_nothing(base, me, tmp_path, capsys):
    out = shutil.copytree(base / "net", tmp_path / "net")
    push(base, out, dry_run="true")
    assert not me.repos and not sends(me)
    told = capsys.readouterr().out
    for name, data in contents(out).items():
        assert f"{len(data):,} bytes  {name}\n" in told
    assert "me/net (private, new)" in told and "Nothing is sent" in told
    push(base, out)
    assert head(me).items() >= contents(out).items()


def test_a_card_with_the_name_of_another_repository_gets_the_new_one_unless_it_was_edited(base, me, tmp_path):
    push(base, tmp_path / "net", push_to="me/typo", dry_run="true")
    card = tmp_path / "net" / "README.md"
    assert "# me/typo\n" in card.read_text()
    push(base, tmp_path / "net", push_to="me/net")
    assert b"typo" not in head(me)["README.md"] and b"# me/net\n" in head(me)["README.md"]
    card.write_text(edited := card.read_text() + "mine")
    push(base, tmp_path / "net", push_to="team/net")
    assert head(me, "team/net")["README.md"].decode() == edited


def test_no_repository_is_made_for_an_export_that_fails(base, me, tmp_path, capsys):
    with pytest.raises(SystemExit):
        push(base, tmp_path / "if", encoder=str(tmp_path / "gone"))
    assert "cannot be loaded (there is no such folder)" in capsys.readouterr().err
    assert not me.repos and not sends(me)


def test_an_export_that_is_there_is_pushed_with_what_was_written_into_its_card(base, me, tmp_path, capsys):
    out = shutil.copytree(base / "net", tmp_path / "net")
    push(base, out)
    assert 'from_pretrained("me/net"' in head(me)["README.md"].decode(), "the card names the repository"
    card = out / "README.md"
    card.write_text(card.read_text() + "\nSeen by me.\n")
    push(base, out)
    assert "Seen by me." in head(me)["README.md"].decode()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        push(base, out, license="openrail", weights="master")
    told = capsys.readouterr().err
    assert "is another export than this one (" in told
    assert "license mit, now openrail" in told and "weights ema, now master" in told


def test_another_step_of_the_run_takes_the_place_of_the_earlier_one(base, me, tmp_path, capsys):
    push(base, shutil.copytree(base / "net", tmp_path / "net"))
    stale = {"unet/old.safetensors": b"of more shards", "assets/picture.png": b"mine"}
    me.repos[REPO].commit(head(me) | stale)
    push(base, tmp_path / "second", run="later", private="false")
    assert b"step: 8" in head(me)["README.md"] and head(me)["assets/picture.png"] == b"mine"
    assert "unet/old.safetensors" not in head(me) and me.repos[REPO].private
    assert "removed  unet/old.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("no token", "push_to=me/net needs a token of the hub: make a token that may write"),
        ("wrong token", "the hub does not know this token: make a token that may write"),
        ("read", "the token of me may only read"),
        ("of others", "me, whose token this is, may make no repository of them on the hub, only of me, team"),
        ("of readers", "may make no repository of readers on the hub"),
        ("no right", "the hub does not allow this for them/net with this token"),
        ("full", "push_to=me/net holds 1 file on the hub that no export of this run has put there (first: README.md)"),
        ("another run", "that no export of this run has put there"),
        ("public", "me/net on the hub is public: give private=false"),
        ("malformed", "push_to must be ORG/NAME"),
        ("lost", "push_to=me/net: the hub answers 503 for me/net (busy): try again later, or export without push_to="),
        ("gone", "push_to=me/net: the hub is not reached (ConnectError): try again later, or export without push_to="),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_the_export(base, me, tmp_path, monkeypatch, capsys, case, told):
    names = {
        "of others": "them/net",
        "no right": "them/net",
        "of readers": "readers/net",
        "malformed": "https://me/net",
    }
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_secretanother")
    elif case == "read":
        me.add_user(TOKEN, "me", role="read")
    elif case == "no right":
        me.repos["them/net"] = Repo()
        me.repos["them/net"].commit({})
    elif case == "full":
        me.repos[REPO] = Repo(private=True)
        me.repos[REPO].commit(CARD_ONLY)
    elif case == "another run":
        me.repos[REPO] = Repo(private=True)
        me.repos[REPO].commit({"README.md": re.sub(b"run: .*", b"run: '0'", (base / "net" / "README.md").read_bytes())})
    elif case == "public":
        me.repos[REPO] = Repo()
        me.repos[REPO].commit({})
    elif case == "lost":
        me.before = lambda method, path: refusal(503, "busy") if path.startswith("/api/models/") else None
    elif case == "gone":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    before = sends(me)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        push(base, tmp_path / "if", push_to=names.get(case, REPO))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and told in error
    assert error.count("\n") == 1 and "secret" not in error
    assert not (tmp_path / "if").exists() and sends(me) == before


def test_a_hub_that_is_lost_after_the_export_is_told_with_the_key(me, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"push_to={REPO}: the hub is not reached \(ConnectError\): try again later"):
        make(Destination(HubName(REPO), private=True, is_new=True))


def test_a_dry_run_without_push_to_is_refused(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        push(base, tmp_path / "if", push_to="", dry_run="true")
    assert "dry_run=true lists what push_to=ORG/NAME would send" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_push_goes_on_where_it_was(repo, hub, tmp_path):
    """Killed once one of its large files is there, the same command sends the others."""
    hub.add_user(TOKEN, "me")
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5"), dim=NET.encoder_dim))
    write_meta(tmp_path / "t5", tmp_path / "text")
    write_run(tmp_path / "run", NET, tmp_path / "text")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "train.export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'if'}",
               "encoder=auto", "license=mit", f"push_to={REPO}"]  # fmt: skip
    started: list[subprocess.Popen] = []

    def before(method: str, path: str) -> Response | None:
        if method != "PUT" or not hub.uploads:
            return None
        os.kill(started[0].pid, signal.SIGKILL)
        return refusal(403, "too late")

    hub.before = before
    started.append(subprocess.Popen(command, cwd=repo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    started[0].communicate(timeout=300)
    assert started[0].returncode == -signal.SIGKILL and len(hub.uploads) == 1
    hub.before = lambda method, path: None
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads)) > 1
    assert head(hub).items() >= contents(tmp_path / "if").items()
    assert "secret" not in done.stdout + done.stderr
    assert json.loads((step_folder(tmp_path / "run", 7) / "manifest.json").read_text())["step"] == 7
