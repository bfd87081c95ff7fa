"""Google's storage, by an S3 server, and Azure's, by Azurite, with faults in front of them: reading, small files."""

import io
import multiprocessing
import random

import pytest

from data.index import Index, index
from data.storage import azure, clients, google, retries
from data.storage.locations import join, list_names, open_location, read_bytes, size_of, whole_file
from data.storage.shards import find_shards
from data.storage.tars import write_shard
from tests.test_sources import DATA, child, with_small_blocks

pytest_plugins = ["tests.support.faulty_server"]


@pytest.fixture(params=["gs", pytest.param("az", marks=pytest.mark.slow)])
def server(request, monkeypatch):
    return with_small_blocks(request, monkeypatch, 0.5)


def test_reads_and_seeks_are_those_of_a_file_in_memory(server):
    chance, expected = random.Random(1), io.BytesIO(DATA)
    with open_location(join(server.where, "0.tar")) as found:
        for _ in range(30):
            if chance.random() < 0.5:
                position = chance.randrange(110_000)
                assert found.seek(position) == expected.seek(position)
            n = chance.choice([1, 512, 5000, 40_000])
            assert found.read(n) == expected.read(n)
        assert size_of(found) == len(DATA) and found.read() == DATA
    assert read_bytes(server.put("empty.tar", b"")) == b""


@pytest.mark.parametrize("fault", ["mute", "cut", "500", "503", "refuse"])
def test_a_failure_is_tried_again(server, fault):
    server.faults = ["", fault, ""]
    assert read_bytes(join(server.where, "0.tar")) == DATA
    assert not server.faults


def test_what_will_not_change_is_not_tried_again(server):
    with pytest.raises(FileNotFoundError, match=r"some/none\.tar is not there"):
        open_location(join(server.where, "none.tar"))
    server.faults = ["403"]
    with pytest.raises(PermissionError, match=r"some/0\.tar may not be read"):
        open_location(join(server.where, "0.tar"))


def test_a_file_that_changes_is_noticed(server):
    with open_location(join(server.where, "0.tar")) as file:
        file.read(100)
        server.put("0.tar", DATA[::-1])
        with pytest.raises(clients.UnreadableError, match="changed while it was read"):
            file.read()


def test_forked_processes_read_with_connections_of_their_own(server):
    where = join(server.where, "0.tar")
    context = multiprocessing.get_context("fork")
    answers, barrier = context.Queue(), context.Barrier(3)
    with open_location(where) as file:
        begin = file.read(100)
        children = [context.Process(target=child, args=(where, 11_000 * n, barrier, answers)) for n in (1, 2)]
        for process in children:
            process.start()
        barrier.wait()
        assert begin + file.read() == DATA
        for process in children:
            process.join(60)
    assert [process.exitcode for process in children] == [0, 0] and all(answers.get(timeout=20) for _ in children)


def test_an_index_is_written_beside_the_shards(server, tmp_path):
    write_shard(tmp_path / "0.tar", [(f"{i}", {"txt": b"a", "jpg": b"b"}) for i in range(5)])
    for name in ("00000.tar", "odd name+%41#?.tar"):
        server.put(f"shards/{name}", (tmp_path / "0.tar").read_bytes())
    server.put("shards/deeper/9.tar", b"")
    where = join(server.where, "shards")
    index(Index(where, workers=1))
    assert sorted(list_names(where)) == ["00000.tar", "index.json", "odd name+%41#?.tar"]
    assert [shard.count for shard in find_shards(where)] == [5, 5]
    with pytest.raises(ValueError, match="cannot be written: name a path or s3://"), whole_file(join(where, "x.tar")):
        pass


@pytest.mark.slow
def test_azure_without_credentials_is_one_line(az_server, monkeypatch):
    monkeypatch.delenv(azure.CONNECTION)
    azure._service.cache_clear()
    with pytest.raises(PermissionError, match="no credentials for az://: set AZURE_STORAGE_CONNECTION_STRING, or"):
        list_names(az_server.where)


def test_google_without_credentials_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("google.auth", reason="needs google-auth")
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", google.EMULATOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    google._session.cache_clear()
    with pytest.raises(PermissionError, match=r"no credentials for gs://.*gcloud auth application-default login"):
        open_location("gs://bucket/0.tar")
