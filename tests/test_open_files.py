"""A bounded number of open files; and faults of the machine, which are never a bad sample."""

import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.images import BadImage
from data.loader.cursor import RawSample, ShardCursor, ShardUnreadable
from data.loader.dataset import find_datasets
from data.loader.stream import MicroBatches, micro_batches
from data.storage import local_files, retries
from data.storage.local_files import OpenFiles, PooledFile
from data.storage.locations import open_location, read_bytes
from data.storage.machine import MachineError, check_open_files, open_handles
from data.storage.shards import find_shards
from data.storage.tars import write_stats
from data.text.meta import TextMeta
from data.text.sidecar_check import check_sidecar
from data.text.sidecar_record import SidecarRecord
from tests.test_stream import pictures, write_dataset  # noqa: F401  # the former is a fixture

SAMPLES = 48


@pytest.fixture(scope="module")
def config(tmp_path_factory, pictures) -> DataConfig:  # noqa: F811
    return write_dataset(tmp_path_factory.mktemp("shards"), pictures[:SAMPLES], per_shard=3)


@pytest.fixture(autouse=True)
def new_pool(monkeypatch) -> None:
    monkeypatch.setattr(local_files, "open_files", OpenFiles())


@contextmanager
def soft_limit(handles: int) -> Iterator[None]:
    """This process's limit of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handles, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def no_handle_left() -> Iterator[None]:
    """All handles of this process are in use."""
    taken = []
    with soft_limit(open_handles() + 20):
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        try:
            yield
        finally:
            for handle in taken:
                os.close(handle)


def open_tars() -> int:
    targets = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:  # that of the listing itself
            continue
    return sum(target.endswith(".tar") for target in targets)


def stream(config: DataConfig, **changes: int) -> MicroBatches:
    settings = {"image_size": 8, "seed": 0, "global_batch": 16, "micro_batch": 4} | changes
    return MicroBatches(config, find_datasets(config), TextMeta.read(config.text), **settings)


def content(config: DataConfig, batches: int, workers: int = 0) -> tuple[list[bytes], int]:
    """The bytes of some batches, none of which has a bad sample; and the most tars that were opened at a time."""
    before, made, most = open_tars(), micro_batches(stream(config), workers, False), 0
    found = []
    for _ in range(batches):
        batch = next(made)
        assert not batch.bad
        found.append(batch.pixels.numpy().tobytes() + batch.text_emb.numpy().tobytes() + batch.visit.numpy().tobytes())
        most = max(most, open_tars() - before)
    return found, most


@given(st.integers(2, 5), st.integers(1, 16), st.integers(1, 3), st.integers(1, 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bound_of_open_files_changes_no_batch(config, bound, streams, phases, shuffle_block):
    config.streams, config.phases, config.shuffle_block = streams, phases, shuffle_block
    local_files.open_files = OpenFiles(1000)
    expected, _ = content(config, 30)
    local_files.open_files = OpenFiles(bound)
    found, most = content(config, 30)
    assert found == expected and most <= bound


def test_a_file_that_was_closed_is_read_on_at_the_same_byte(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 200)
    asked: list[tuple[int, int]] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: asked.append((at, sum(map(len, b)))) or real(fd, b, at))
    local_files.open_files = OpenFiles(2)
    files = [open_location(str(tmp_path / "a")) for _ in range(5)]
    data = [b""] * 5
    while len(data[0]) < 51_200:
        data = [got + file.read(10_240) for got, file in zip(data, files, strict=True)]
        assert len(local_files.open_files) == 2
    assert set(data) == {bytes(range(256)) * 200}
    assert sum(min(51_200, at + size) - at for at, size in asked) == 5 * 51_200, "no byte is read twice"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spare", [8, 40])
def test_a_low_limit_makes_no_sample_bad(config, spare, workers):
    """Sixteen streams with two files each; a worker needs some for itself."""
    config.streams, config.phases, config.shuffle_block = 16, 1, 4
    expected, _ = content(config, 24)
    local_files.open_files = OpenFiles()
    with soft_limit(open_handles() + spare + 15 * workers):
        assert content(config, 24, workers)[0] == expected


def test_where_no_handle_is_left_idle_files_are_closed(config):
    config.streams, config.phases, config.shuffle_block = 16, 1, 4
    expected, _ = content(config, 24)
    made = micro_batches(stream(config), 0, False)
    found = [next(made) for _ in range(4)]
    with no_handle_left():
        found += [next(made) for _ in range(20)]
    assert not any(batch.bad for batch in found)
    assert [batch.pixels.numpy().tobytes() in whole for batch, whole in zip(found, expected, strict=True)] == [
        True
    ] * 24


@pytest.mark.parametrize("unreadable", ["skip", "fail"])
def test_no_handle_at_all_is_an_error_with_its_remedy(config, unreadable):
    shard = find_shards(config.shards)[0]
    with no_handle_left(), pytest.raises(MachineError) as raised:
        ShardCursor(shard, config.text, unreadable)
    assert "00000.tar cannot be read for a fault of this machine (Too many open files, the limit is " in str(
        raised.value
    )
    assert "run `ulimit -n 65536` before it" in str(raised.value)
    assert ShardCursor(shard, config.text, unreadable).read(0).problem == ""


def test_a_server_is_not_to_blame_where_no_handle_is_left():
    with no_handle_left(), pytest.raises(MachineError, match=r"http://127\.0\.0\.1:9/0\.tar cannot .*ulimit -n"):
        open_location("http://127.0.0.1:9/0.tar")


def failing(monkeypatch, number: int, times: int, name: str = "") -> list[str]:
    """Reading files of this name fails so many times with this error; returns the list of the failures to come."""
    failures: list[str] = []
    real = os.preadv

    def preadv(handle: int, buffers: list, offset: int) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.endswith(name) and path.endswith(".tar") and len(failures) < times:
            failures.append(path)
            raise OSError(number, os.strerror(number))
        return real(handle, buffers, offset)

    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0001)
    monkeypatch.setattr(os, "preadv", preadv)
    return failures


def rows(config: DataConfig, unreadable: str = "skip") -> list[RawSample]:
    cursor = ShardCursor(find_shards(config.shards)[0], config.text, unreadable)
    return [cursor.read(row) for row in range(3)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_disk_that_fails_for_a_while_changes_nothing(config, monkeypatch, caplog, number):
    expected = rows(config)
    for name in ("00000.tar", "text/00000.tar"):
        local_files.open_files = OpenFiles()
        failures = failing(monkeypatch, number, 7, name)
        found = rows(config)
        assert [(s.name, s.image, s.problem) for s in found] == [(s.name, s.image, s.problem) for s in expected]
        assert [s.embedding.read() for s in found] == [s.embedding.read() for s in expected]
        assert len(failures) == 7
    assert "trying again for up to a minute" in caplog.messages[0] and os.strerror(number) in caplog.messages[0]


def test_a_disk_that_fails_for_good_makes_shards_unreadable_and_no_sample_damaged(config, monkeypatch, caplog):
    failures = failing(monkeypatch, errno.EIO, 10**9)
    assert [s.problem for s in rows(config)] == ["shard unreadable"] * 3
    assert len(failures) == 2 * retries.MAX_TRIES, "the shard and its sidecar, not each of their samples"
    assert "00000.tar: 8 tries in a row failed (Input/output error)" in caplog.text
    with pytest.raises(
        ShardUnreadable, match=r"failed \(Input/output error\); repair it, or set data.unreadable_shard=sk"
    ):
        rows(config, "fail")


def test_embeddings_on_a_disk_that_fails_are_unreadable_and_cost_the_wait_once(config, monkeypatch):
    config.streams, config.phases, config.shuffle_block = 1, 1, SAMPLES
    made = micro_batches(stream(config), 0, False)
    assert not next(made).bad
    failures = failing(monkeypatch, errno.ESTALE, 10**9)
    reasons = Counter(reason for _ in range(8) for _, reason in next(made).bad)
    assert reasons == {"embeddings unreadable": 32}
    assert len(failures) == 16 * retries.MAX_TRIES, "each of 16 sidecars once"


@pytest.mark.parametrize("unreadable", ["skip", "fail"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENFILE, errno.ENOSPC, errno.EDQUOT])
def test_a_machine_that_is_out_of_something_ends_the_run(config, monkeypatch, number, unreadable):
    failing(monkeypatch, number, 10**9)
    with pytest.raises(MachineError, match=rf"fault of this machine \({os.strerror(number)}\): \w+ .*"):
        rows(config, unreadable)


def test_no_sidecar_is_written_off_where_no_handle_is_left(config, monkeypatch, tmp_path):
    """data.embed mode=repair would make all its embeddings anew."""
    text = shutil.copytree(config.text, tmp_path / "text")
    config = replace(config, text=str(text))
    shard, meta = find_shards(config.shards)[0], TextMeta.read(config.text)
    write_stats(Path(config.text) / "00000.tar", 3, SidecarRecord(["0" * 16] * 3, ["0" * 8] * 3).stats())
    assert len(check_sidecar(shard, config.text, meta).damaged) == 3, "it is read"
    failing(monkeypatch, errno.ENFILE, 10**9, "text/00000.tar")
    with pytest.raises(MachineError, match=r"text/00000\.tar cannot be read for a fault of this machine"):
        check_sidecar(shard, config.text, meta)


def test_a_bound_of_one_handle_too_many_is_forgiven_once(config, monkeypatch):
    failures = failing(monkeypatch, errno.ENFILE, 1)
    assert [s.problem for s in rows(config)] == [""] * 3 and len(failures) == 1


def test_a_file_that_was_replaced_while_it_was_closed_is_not_read_on(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(20_000))
    local_files.open_files = OpenFiles(1)
    with open_location(str(path)) as file:
        assert file.read(10_000) == bytes(10_000)
        read_bytes(__file__)  # closes it
        path.write_bytes(bytes(30_000))
        with pytest.raises(OSError, match=r"a changed while it was read"):
            file.read()


def test_a_forked_process_counts_its_own(config):
    gc.collect()
    others = open_tars()
    file = PooledFile(f"{config.shards}/00000.tar")
    assert (len(local_files.open_files), open_tars()) == (1, others + 1)
    if (child := os.fork()) == 0:
        mine = local_files.open_files
        right = (len(mine), open_tars()) == (0, others) and file.read_at(0, bytearray(9)) == 9 and len(mine) == 1
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    del file
    assert open_tars() == others


def test_the_limit_is_raised_at_the_start_of_a_command(repo):
    code = (
        "import resource as r; from data.cli import run_command; h = r.getrlimit(r.RLIMIT_NOFILE)[1]; "
        "r.setrlimit(r.RLIMIT_NOFILE, (100, min(h, 3000))); "
        "run_command(lambda _: print(*r.getrlimit(r.RLIMIT_NOFILE)), str, [])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True).stdout
    soft, hard = map(int, found.split())
    assert soft == hard > 100


def test_a_limit_that_a_training_does_not_fit_in_is_told_with_all_numbers():
    in_use = open_handles()
    with soft_limit(in_use + 99), pytest.raises(MachineError) as raised:
        check_open_files(workers=4, ranks=1)
    assert (
        f"the limit of open files is {in_use + 99} (ulimit -n), and this training needs {in_use + 100}: {in_use} are "
        "open, and 64, 8 for each of 4 loader workers and 4 for each of 1 ranks come to them: run `ulimit -n 65536`"
    ) in str(raised.value)
    with soft_limit(in_use + 100):
        check_open_files(workers=4, ranks=1)


def test_a_training_under_such_a_limit_ends_before_its_first_step(repo, tmp_path):
    command = f"ulimit -n 60; {sys.executable} train/main.py +experiment=smoke run_dir={tmp_path}/run data.shards=no"
    done = subprocess.run(["bash", "-c", command], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the limit of open files is 60 (ulimit -n), and this training needs ")
    assert done.stderr.count("\n") == 1


OUT_OF_MEMORY = """
import io, resource
from PIL import Image
from data.images import decode
from data.storage.machine import MachineError
file = io.BytesIO()
Image.new("RGB", (7000, 7000)).save(file, "PNG")
decode(file.getvalue())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    decode(file.getvalue())
except MachineError as error:
    print(error)
"""


def test_an_image_is_not_to_blame_where_no_memory_is_left(repo):
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], cwd=repo, capture_output=True, text=True)
    assert "fault of this machine (Cannot allocate memory): give the job more memory" in done.stdout, done.stderr


def test_an_image_that_asks_for_too_much_memory_is_corrupt(monkeypatch):
    from data import images

    def greedy(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_open", greedy)
    with pytest.raises(BadImage, match="corrupt image"):
        images.decode(b"\xff\xd8\xff\xd9")
