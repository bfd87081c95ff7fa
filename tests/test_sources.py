"""Reading over HTTP and from S3: the right bytes whatever the server does, and no more tries than are agreed."""

import errno
import io
import itertools
import multiprocessing
import os
import random
import socket
import subprocess
import sys

import pytest

from data.storage import clients, locations, retries
from data.storage.atomic import atomic_file, atomic_folder
from data.storage.clients import UnreadableError
from data.storage.locations import join, list_names, open_location, read_bytes, size_of, split, write_whole

pytest_plugins = ["tests.support.faulty_server"]

DATA = random.Random(0).randbytes(100_000)


def with_small_blocks(request, monkeypatch, read_timeout: float):
    """The server that the fixture's parameter names, with DATA on it. Blocks are small, waits short."""
    for module, name, value in (
        (clients, "READ_TIMEOUT", read_timeout), (clients, "CHUNK", 512), (retries, "FIRST_WAIT", 0.001),
        (locations, "FIRST_BLOCK", 4096), (locations, "LARGEST_BLOCK", 16384),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    running = request.getfixturevalue(f"{request.param}_server")
    running.put("0.tar", DATA)
    return running


@pytest.fixture(params=["http", "s3"])
def server(request, monkeypatch):
    """HTTP, or S3 with the same faults in front of it."""
    return with_small_blocks(request, monkeypatch, 0.25)


def test_reads_and_seeks_are_those_of_a_file_in_memory(server):
    chance, expected = random.Random(1), io.BytesIO(DATA)
    with open_location(join(server.where, "0.tar")) as found:
        for _ in range(300):
            if chance.random() < 0.5:
                offset, whence = chance.choice(
                    [(chance.randrange(110_000), 0), (chance.randrange(9000), 1), (-chance.randrange(9000), 2)]
                )
                assert found.seek(offset, whence) == expected.seek(offset, whence)
            n = chance.choice([1, 512, 5000, 40_000])
            assert found.read(n) == expected.read(n)
        assert size_of(found) == len(DATA) and found.read() == DATA


@pytest.mark.parametrize("fault", ["stall", "mute", "cut", "reset", "short", "refuse", "500", "503", "429"])
def test_a_failure_is_gone_on_from_where_it_came(server, fault):
    server.faults = ["", fault, "", fault, fault, ""]
    assert read_bytes(join(server.where, "0.tar")) == DATA
    assert not server.faults
    if fault in ("stall", "cut", "short"):
        starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in server.asked]
        assert all(a < b for a, b in itertools.pairwise(starts)), "each request goes on after the last"
        # What arrived is not fetched again, but for the chunk that broke.
        assert server.sent <= len(DATA) + 3 * clients.CHUNK


@pytest.mark.parametrize("fault", ["stall", "mute", "cut", "short", "refuse", "500"])
def test_a_first_request_that_fails_is_tried_again(server, fault):
    server.faults = [fault]
    assert read_bytes(join(server.where, "0.tar")) == DATA


@pytest.mark.parametrize("fault", ["mute", "refuse", "500"])
def test_after_so_many_tries_it_is_over(server, fault):
    server.faults, server.for_good = ["", "", fault], True
    with (
        open_location(join(server.where, "0.tar")) as file,
        pytest.raises(UnreadableError, match=r"some/0\.tar: 8 tries in a row"),
    ):
        file.read()
    assert len(server.asked) == 2 + retries.MAX_TRIES


def test_waits_double_and_end_at_the_longest(server, monkeypatch):
    waits = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.03)
    server.faults, server.for_good = ["500"], True
    with pytest.raises(UnreadableError):
        open_location(join(server.where, "0.tar"))
    whole = [0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.03]
    assert all(0.5 * w <= wait <= w for wait, w in zip(waits, whole, strict=True))


@pytest.mark.parametrize(
    ("fault", "error"), [("404", FileNotFoundError), ("403", PermissionError), ("400", UnreadableError)]
)
def test_what_will_not_change_is_not_tried_again(server, fault, error):
    server.faults = [fault]
    with pytest.raises(error, match=r"some/0\.tar"):
        open_location(join(server.where, "0.tar"))
    assert len(server.asked) == 1
    with pytest.raises(FileNotFoundError):
        open_location(join(server.where, "nowhere.tar"))


def test_a_file_that_changes_is_noticed(server):
    with open_location(join(server.where, "0.tar")) as file:
        file.read(100)
        server.put("0.tar", DATA[::-1])
        with pytest.raises(UnreadableError, match="changed while it was read"):
            file.read()


def test_an_empty_file_is_empty(server):
    assert read_bytes(server.put("empty.tar", b"")) == b""


def test_reading_on_takes_few_requests_and_a_jump_takes_little(server):
    where = server.put("long.tar", DATA * 10)
    with open_location(where) as file:
        assert file.read() == DATA * 10
    assert len(server.asked) <= 2 + len(DATA) * 10 / locations.LARGEST_BLOCK + 3
    server.asked.clear()
    server.sent = 0
    with open_location(where) as file:
        for position in range(100_000, 900_000, 100_000):
            file.seek(position)
            assert file.read(100) == DATA[:100]
    assert server.sent <= 9 * locations.FIRST_BLOCK


def child(location: str, start: int, barrier, answers) -> None:
    barrier.wait()
    with open_location(location) as file:
        file.seek(start)
        answers.put(file.read() == DATA[start:])


def test_forked_processes_read_with_connections_of_their_own(server):
    """A parent's kept connection, used by several children, would mix their answers."""
    where = join(server.where, "0.tar")
    context = multiprocessing.get_context("fork")
    answers, barrier = context.Queue(), context.Barrier(5)
    with open_location(where) as file:
        begin = file.read(100)  # nothing is fetched ahead yet: the connection rests, and every child has a copy of it
        children = [context.Process(target=child, args=(where, 11_000 * n, barrier, answers)) for n in range(1, 5)]
        for process in children:
            process.start()
        barrier.wait()
        assert begin + file.read() == DATA
        for process in children:
            process.join()
        assert [process.exitcode for process in children] == [0] * 4
        assert all(answers.get(timeout=20) for _ in children)


def test_a_server_without_ranges_serves_small_files_and_is_named_for_large_ones(http_server):
    server = http_server
    server.files.update({"small.tar": DATA[:1000], "large.tar": DATA * 10})
    server.faults, server.for_good = ["whole"], True
    assert read_bytes(f"{server.url}/small.tar") == DATA[:1000]
    with open_location(f"{server.url}/large.tar") as file, pytest.raises(UnreadableError, match="HTTP's Range"):
        file.read()


def test_a_server_that_is_not_there_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnreadableError, match="8 tries in a row") as caught:
        open_location(f"{url}/0.tar")
    assert "\n" not in str(caught.value)


def test_folders_are_listed_and_files_written(server):
    if not server.upstream:
        with pytest.raises(ValueError, match=r"cannot be listed over HTTP: name the shards, as in .*/some/\{00000"):
            list_names(server.where)
        with pytest.raises(ValueError, match="cannot be written over HTTP"):
            write_whole(join(server.where, "a"), b"")
        return
    for n in range(3):
        server.put(f"listed/{n}.tar", b"")
    server.put("listed/deeper/9.tar", b"")
    assert list_names(join(server.where, "listed")) == ["0.tar", "1.tar", "2.tar"]


def test_locations_are_taken_apart_and_put_together(tmp_path):
    assert split("s3://b/some/0.tar") == ("s3://b/some", "0.tar")
    assert split("https://h/some/0.tar?key=1")[1] == "0.tar"
    assert (
        split("0.tar") == (".", "0.tar") and split("/0.tar") == ("/", "0.tar") and split("a/b?.tar") == ("a", "b?.tar")
    )
    assert join("s3://b/some/", "0.tar") == "s3://b/some/0.tar" and join("some", "0.tar") == "some/0.tar"
    for wrong in ("gcs://b/0.tar", "file:///0.tar", "pipe://cat 0.tar"):
        with pytest.raises(ValueError, match=r"is not read; use a path, http\(s\)://, s3://, gs:// or az://"):
            open_location(wrong)
    write_whole(str(tmp_path / "a"), b"b")
    assert read_bytes(str(tmp_path / "a")) == b"b" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_names_the_remedy_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for location in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"'.*' could not be written \(.*\): make space there, or choose another"):
            write_whole(str(location), b"b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_an_error_about_another_file_passes_as_it_is(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="nowhere"), write(tmp_path / "a"):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(UnreadableError, match=r"^8 tries$"), write(tmp_path / "a"):
        raise UnreadableError("8 tries")
    with pytest.raises(OSError, match=r"a' could not be written \(No space left on device\)"), write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_finding_reading_and_ordering_samples_needs_no_torch(repo):
    """So that commands which do no more begin at once."""
    modules = (
        "data.images, data.loader.cursor, data.loader.dataset, data.loader.mixture, data.prepare.packing, "
        "data.prepare.scenes, data.inspection.page, data.text.captions, data.text.sidecar_check, data.embed"
    )
    code = f"import sys, {modules}\nprint({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
