"""data.embed and data.index on S3: whole objects, one process for each sidecar, and what is said when it goes wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from data import embed
from data.index import Index, index
from data.storage import clients, object_claims
from data.storage.claims import STALE_AFTER, is_dead, new_holder
from data.storage.locations import exists, file_size, list_names, read_bytes, whole_file, write_whole
from data.storage.object_claims import claim_object
from data.storage.s3_objects import facts, put_if, remove
from data.text import embedding_job
from data.text.meta import check_sidecars
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.test_embed import contents, start, write_shards

BOOT = Path("/proc/sys/kernel/random/boot_id")
pytest_plugins = ["tests.support.faulty_server"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    write_tiny_t5(TinyT5(out=str(folder)))
    return folder


def arguments(shards: Path, out: str, encoder: Path, **more: object) -> list[str]:
    settings = {"encoder": encoder, "tokens": 12, "compute": "float32", "dtype": "float32", "batch": 4, **more}
    return [f"shards={shards}", f"out={out}", *(f"{k}={v}" for k, v in settings.items())]


def objects(where: str) -> dict[str, bytes]:
    return {name: read_bytes(f"{where}/{name}") for name in sorted(list_names(where))}


def test_embeddings_on_s3_are_those_of_a_folder(t5, tmp_path, s3_server, capsys):
    shards, out = write_shards(tmp_path / "shards", 3, 9), f"{s3_server.where}/text"
    embed.main(arguments(shards, str(tmp_path / "text"), t5))
    embed.main(arguments(shards, out, t5))
    assert objects(out) == contents(tmp_path / "text")
    capsys.readouterr()
    embed.main(arguments(shards, out, t5))
    assert "3 shards of embeddings" in (said := capsys.readouterr().out) and "0 new" in said
    # A shard with other captions, a sidecar that is gone, another with a record of other bytes.
    write_shards(shards, 1, 7)
    s3_server.put("text/00001.tar", b"cut")
    remove(f"{out}/00002.tar")
    remove(f"{out}/00002_stats.json")
    embed.main(arguments(shards, out, t5))
    said = capsys.readouterr().out
    assert all(part in said for part in ("1 new, 2 made again", "1 shards were packed anew", "1 sidecars were damaged"))
    embed.main(arguments(shards, out, t5, mode="check"))
    index(Index(out, workers=1))
    shards_found = embed.find_shards(str(shards))
    assert check_sidecars(shards_found, out, 12, 0).tokens == 12
    assert not [name for name in list_names(out) if name.endswith((".claim", ".part"))]
    with pytest.raises(SystemExit):
        embed.main(arguments(shards, "http://127.0.0.1/text", t5))
    assert "cannot be written over HTTP" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_shards_of_a_bucket_and_outlive_a_killed_one(t5, tmp_path, s3_server):
    shards, out = write_shards(tmp_path / "shards", 8, 40), f"{s3_server.where}/text"
    embed.main(arguments(shards, str(tmp_path / "alone"), t5))
    workers = [start(shards, out, t5) for _ in range(2)]
    while not any(name.endswith(".tar.claim") for name in list_names(out)):
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.communicate(timeout=120)
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0]
    assert objects(out) == contents(tmp_path / "alone")


def test_a_claim_is_of_one_and_passes_on_when_its_holder_is_gone(s3_server, monkeypatch, caplog):
    where, file = f"{s3_server.where}/0.tar", f"{s3_server.where}/0.tar.claim"
    with claim_object(where) as held:
        assert held.is_held() and claim_object(where) is None and not caplog.records
        before = facts(file).etag
        held.renew()
        assert facts(file).etag == before, "no request more often than needed"
        monkeypatch.setattr(object_claims, "RENEW_EVERY", 0.0)
        held.renew()
        assert facts(file).etag != before and held.is_held()
        assert put_if(file, b"taken", before) == "", "who found it stale before comes too late"
        write_whole(file, b"elsewhere-1-abc")
        assert claim_object(where) is None and not held.is_held()
        held.renew()
        assert read_bytes(file) == b"elsewhere-1-abc", "a lost claim is not renewed"
        monkeypatch.setattr(object_claims, "STALE_AFTER", -1.0)
        with claim_object(where) as heir:
            assert heir.is_held() and not held.is_held()
    assert not exists(file) and STALE_AFTER > 0


def test_an_answer_that_came_too_late_leaves_no_claim_of_nobody(s3_server, monkeypatch):
    monkeypatch.setattr(object_claims, "new_holder", lambda: "me-1-a")
    write_whole(f"{s3_server.where}/0.tar.claim", b"me-1-a")  # written, but the client has not heard of it
    with claim_object(f"{s3_server.where}/0.tar") as held:
        assert held.is_held()


def test_a_renewal_whose_answer_was_lost_is_still_of_its_holder(s3_server, monkeypatch):
    lose: list[str] = []

    class Losing(s3_server.RequestHandlerClass):
        def do_PUT(self):
            status, headers, body = self.hand_on()
            self.answer(int(lose.pop()) if lose else status, headers, body)

    s3_server.RequestHandlerClass = Losing
    monkeypatch.setattr(object_claims, "RENEW_EVERY", 0.0)
    where, file = f"{s3_server.where}/0.tar", f"{s3_server.where}/0.tar.claim"
    with claim_object(where) as held:
        lose.append("500")
        held.renew()  # written, answered 500, sent again, refused
        assert not lose and read_bytes(file).endswith(b" 1")
        held.renew()
        assert read_bytes(file).endswith(b" 2")
    monkeypatch.setattr(object_claims, "STALE_AFTER", -1.0)
    write_whole(file, b"elsewhere-1-abc")
    put_if_there = object_claims.put_if
    monkeypatch.setattr(object_claims, "put_if", lambda *a: lose.extend(["500"] * (len(a) > 2)) or put_if_there(*a))
    with claim_object(where) as heir:
        assert heir.is_held(), "it took the claim over, though the answer was lost"


DIES = """
import os, sys
from data.storage.object_claims import claim_object
held = claim_object(sys.argv[1])
held.aside.write_bytes(b"half")
print(held.aside, flush=True)
os._exit(1)
"""


def test_what_a_killed_process_left_in_tmpdir_is_removed_by_its_heir(s3_server):
    where = f"{s3_server.where}/0.tar"
    part = Path(subprocess.run([sys.executable, "-c", DIES, where], stdout=subprocess.PIPE, text=True).stdout.strip())
    assert part.read_bytes() == b"half"
    with claim_object(where) as heir:
        assert heir.is_held() and not part.exists() and heir.aside.parent == part.parent


@pytest.mark.skipif(not BOOT.exists(), reason="needs Linux")
def test_only_a_process_of_this_boot_and_container_is_known_to_be_dead():
    name = [sys.executable, "-c", "from data.storage.claims import new_holder; print(new_holder())"]
    dead = subprocess.run(name, stdout=subprocess.PIPE, text=True).stdout.strip()
    assert is_dead(dead) and not is_dead(new_holder())
    boot, container = BOOT.read_text()[:8], str(os.stat("/proc/self/ns/pid").st_ino)
    for other in (dead.replace(boot, "0badb007"), dead.replace(container, "1"), f"{dead}/../x", "", "\0"):
        assert other != dead and not is_dead(other), other


@pytest.mark.parametrize("status", [0, 501])
def test_a_storage_without_conditional_writes_is_named_once(s3_server, caplog, status):
    asked: list[str] = []

    class Unconditional(s3_server.RequestHandlerClass):
        def do_PUT(self):
            asked.append(self.headers.get("If-None-Match", ""))
            if asked[-1]:
                del self.headers["If-None-Match"]
            status_, headers, body = self.hand_on()
            self.answer(*((status, {}, b"") if asked[-1] and status else (status_, headers, body)))

    s3_server.RequestHandlerClass = Unconditional
    for number in range(2):
        with claim_object(f"{s3_server.where}/{number}.tar") as held:
            assert held.is_held()
    assert caplog.text.count("no conditional writes: let one process at a time write") == 1
    assert asked == (["*", "", "*", ""] if status else ["*"] * 3)


def test_what_cannot_be_written_is_one_line_and_nothing_is_half_there(t5, tmp_path, s3_server, capsys):
    shards, out = write_shards(tmp_path / "shards", 2, 9), f"{s3_server.where}/text"
    s3_server.read_only = "00001.tar"
    with pytest.raises(SystemExit):
        embed.main(arguments(shards, out, t5))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: s3://") and "00001.tar" in error and "403" in error
    assert not [name for name in list_names(out) if name.startswith("00001") or name.endswith(".claim")]
    s3_server.read_only = ""
    embed.main(arguments(shards, out, t5))
    embed.main(arguments(shards, out, t5, mode="check"))


def test_a_bucket_that_does_not_exist_is_one_line(t5, tmp_path, s3_server, monkeypatch, capsys):
    monkeypatch.setattr(embedding_job, "POLL_SECONDS", -1.0)  # nothing is waited for
    with pytest.raises(SystemExit):
        embed.main(arguments(write_shards(tmp_path / "shards", 1, 2), "s3://no-such-bucket/text", t5))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: s3://") and "bucket does not exist" in error


def test_a_large_object_comes_in_parts_and_a_failed_one_not_at_all(s3_server):
    where, data = f"{s3_server.where}/large.tar", os.urandom(20 << 20)
    with whole_file(where) as part:
        part.write_bytes(data)
    assert read_bytes(where) == data and file_size(where) == len(data)
    s3_server.read_only = "partNumber=2"
    with pytest.raises(OSError, match="could not be written"), whole_file(f"{s3_server.where}/other.tar") as part:
        part.write_bytes(data)
    assert not part.exists() and not exists(f"{s3_server.where}/other.tar")


def test_missing_credentials_are_one_line_with_the_remedy(t5, tmp_path, s3_server, monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys
    clients.s3_client.cache_clear()
    with pytest.raises(OSError, match="Unable to locate credentials: run `aws configure`"):
        list_names(s3_server.where)
    with pytest.raises(SystemExit):
        embed.main(arguments(write_shards(tmp_path / "shards", 1, 2), f"{s3_server.where}/text", t5))
    assert "Unable to locate credentials: run `aws configure`" in capsys.readouterr().err.splitlines()[-1]
