"""The reading of tars: the samples that Python's tarfile finds, or a clean end where a tar is damaged."""

import io
import re
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, read_shard, scan_shard

EXTENSIONS = {"jpg", "txt", "json", "npy"}
KINDS = [tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
words = st.text("abz01_- .äß漢😀", min_size=1, max_size=12)
long_words = st.integers(60, 140).map(lambda n: "long" * (n // 4))
names = st.builds(
    lambda folders, stem, extension: "/".join([*folders, stem + extension]),
    st.lists(words | long_words | st.just("__meta__"), max_size=2),
    words | long_words | st.sampled_from(["0", "1"]),
    st.sampled_from([".jpg", ".JPG", ".txt", ".json", ".npy", "", ".seg.png", "."]),
)
members = st.lists(
    st.tuples(names, st.sampled_from(KINDS), st.binary(max_size=40), st.integers(1, 125)), max_size=12
)  # the bytes of a member are repeated, so that they go up to 5,000
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def make_tar(files: list[tuple[str, bytes, bytes, int]], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, kind, data, times in files:
            if len(name.encode()) > tarfile.LENGTH_NAME and kind == tarfile.AREGTYPE:
                kind = tarfile.REGTYPE  # cut after a slash, tarfile would take it for a folder (CVE-2025-13462)
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) * times if kind in tarfile.REGULAR_TYPES else 0
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "elsewhere" * (times // 5)
            if kind == tarfile.LNKTYPE:
                info.size = times  # some tars say the size of what it leads to; there is no data all the same
            try:
                tar.addfile(info, io.BytesIO(data * times) if kind in tarfile.REGULAR_TYPES else None)
            except ValueError:
                assert tar_format == tarfile.USTAR_FORMAT  # a name that it cannot hold
    return buffer.getvalue()


def expected(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """The samples that tarfile finds up to where it ends or fails, grouped by hand."""
    found: list[tuple[str, dict[str, bytes]]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                top = member.name.split("/")[0]
                meta = len(top) > 3 and top.startswith("__") and top.endswith("__")
                # A hidden file has no key; to webdataset its folder is one.
                if not member.isreg() or key is None or key.endswith("/") or meta:
                    continue
                content = tar.extractfile(member).read()
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                if (extension := extension.lower()) in EXTENSIONS:
                    found[-1][1][extension] = b"" if extension in found[-1][1] else content
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        pass
    return found


def actual(data: bytes, read: bool = True) -> tuple[list[tuple[str, dict[str, bytes]]], bool]:
    """Our samples, and whether the tar was damaged."""
    found = []
    try:
        reader = ShardReader(io.BytesIO(data), EXTENSIONS)
        while (sample := reader.sample(read)) is not None:
            found.append(sample)
    except DamagedTar:
        return found, True
    return found, False


@given(members, formats)
@settings(max_examples=150, deadline=None)
def test_whole_tars_have_the_samples_that_tarfile_finds(files, tar_format):
    data = make_tar(files, tar_format)
    assert actual(data) == (expected(data), False)


@given(members, formats, st.data())
@settings(max_examples=250, deadline=None)
def test_damaged_tars_have_the_first_of_them_and_as_many_read_as_counted(files, tar_format, chance):
    data = bytearray(make_tar(files, tar_format))
    for _ in range(chance.draw(st.integers(0, 3))):
        data[chance.draw(st.integers(0, len(data) - 1))] = chance.draw(st.integers(0, 255))
    data = bytes(data[: chance.draw(st.integers(0, len(data)))]) + chance.draw(
        st.sampled_from([b"", b"garbage", bytes(512), bytes(1024), make_tar(files[:2], tarfile.GNU_FORMAT)])
    )
    found, damaged = actual(data)
    there = expected(data)
    assert found == there[: len(found)]
    assert damaged or len(found) == len(there)
    # What order.py relies on: a count from headers alone is the number of rows, whatever the file holds.
    passed, also_damaged = actual(data, read=False)
    assert (len(passed), also_damaged) == (len(found), damaged)


@given(st.binary(max_size=3000))
@example(b"")
@example(bytes(512))
@example(b"\x1f\x8b" + bytes(600))
def test_anything_at_all_can_be_given(data):
    found, damaged = actual(data)
    assert not found and damaged == (data[:512] != bytes(512))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_shards_have_the_samples_that_webdataset_finds(tmp_path, tar_format):
    files = [
        (f"some.folder/{n:05d}.{e}", b"0", e.encode(), n) for n in range(40) for e in ("jpg", "txt", "Json", "x.npy")
    ]
    data = make_tar(files, tar_format)
    (tmp_path / "0.tar").write_bytes(data)
    samples = group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}]), suffixes=EXTENSIONS)
    known = [(s["__key__"], {k: v for k, v in s.items() if k[0] != "_"}) for s in samples]
    assert list(read_shard(tmp_path / "0.tar", EXTENSIONS)) == known and len(known) == 40
    assert scan_shard(tmp_path / "0.tar")[::2] == (40, "")


def plain(*named: str) -> bytes:
    return make_tar([(name, tarfile.REGTYPE, name.encode()[::-1], 30) for name in named], tarfile.USTAR_FORMAT)


def test_a_member_that_comes_twice_counts_as_empty_and_a_key_that_comes_back_is_another_sample():
    found, _ = actual(plain("a.jpg", "a.txt", "a.jpg", "b.jpg", "a.jpg", "a.txt"))
    assert [(key, sorted(m), len(m.get("jpg", b""))) for key, m in found] == [
        ("a", ["jpg", "txt"], 0),
        ("b", ["jpg"], 150),
        ("a", ["jpg", "txt"], 150),
    ]


def test_a_file_of_the_old_type_whose_long_name_is_cut_after_a_slash_is_a_file():
    name = "a" * 99 + "/b.jpg"
    data = bytearray(make_tar([(name, tarfile.REGTYPE, b"x", 7)], tarfile.GNU_FORMAT))
    header = tarfile.TarInfo.frombuf(bytes(data[1024:1536]), "utf-8", "strict")
    assert header.name.endswith("/") and header.type == tarfile.REGTYPE
    header.type = tarfile.AREGTYPE
    data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    assert actual(bytes(data)) == ([(name.removesuffix(".jpg"), {"jpg": b"x" * 7})], False)


@pytest.mark.parametrize(
    ("damage", "left", "why"),
    [
        (lambda data: data[:1700], 1, "was cut"),  # within the second file's data
        (
            lambda data: data[:1300],
            0,
            "was cut",
        ),  # within the header that would tell that the first sample is whole
        (lambda data: data[:2048], 1, "was cut"),  # between two files
        (lambda data: data[:1024] + b"x" + data[1025:], 0, "checksum"),  # the second header
        (lambda data: data[:1000] + data[1001:], 0, "header|checksum"),  # a byte was lost
        (lambda data: b"<html>not found</html>" * 100, 0, "header|checksum"),
    ],
)
def test_what_is_wrong_with_a_tar_is_said_and_the_samples_before_it_are_read(tmp_path, damage, left, why):
    data = plain("a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "0.tar").write_bytes(damage(data))
    found, damaged = actual(damage(data))
    count, _, said = scan_shard(tmp_path / "0.tar")
    assert damaged and len(found) == count == left
    assert re.search(why, said), said


def test_sizes_beyond_reason_and_sparse_files_are_damage_not_memory():
    for size, kind in (
        (1 << 40, tarfile.REGTYPE),
        (-5, tarfile.REGTYPE),
        (10, tarfile.GNUTYPE_SPARSE),
        (1 << 30, b"L"),
    ):
        info = tarfile.TarInfo("a.jpg")
        info.size, info.type = size, kind
        with pytest.raises(DamagedTar):
            ShardReader(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)), EXTENSIONS).sample()
