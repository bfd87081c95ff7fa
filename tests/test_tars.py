"""The reading of tars: the samples that Python's tarfile finds, or a clean end where a tar is damaged."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from data.storage.tar_headers import DamagedTar, TarHeaders, padded
from data.storage.tars import ShardReader, read_shard, scan_shard

EXTENSIONS = {"jpg", "txt", "json", "npy"}
KINDS = [tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
# Sparse files: GNU's old ones, with the map in the header alone or in further blocks too; PAX 0.0, 0.1, 1.0.
GNU_SPARSE, PAX_SPARSE = [b"gnu", b"gnu+"], [b"0.0", b"0.1", b"1.0"]
words = st.text("abz01_- .äß漢😀", min_size=1, max_size=12)
long_words = st.integers(60, 140).map(lambda n: "long" * (n // 4))
names = st.builds(
    lambda folders, stem, extension: "/".join([*folders, stem + extension]),
    st.lists(words | long_words | st.just("__meta__"), max_size=2),
    words | long_words | st.sampled_from(["0", "1"]),
    st.sampled_from([".jpg", ".JPG", ".txt", ".json", ".npy", "", ".seg.png", "."]),
)


def members_of(kinds: list[bytes]) -> st.SearchStrategy:
    """Members of these kinds; their bytes are repeated, so that they go up to 5,000."""
    return st.lists(st.tuples(names, st.sampled_from(kinds), st.binary(max_size=40), st.integers(1, 125)), max_size=12)


formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def make_tar(files: list[tuple[str, bytes, bytes, int]], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, kind, data, times in files:
            if kind in GNU_SPARSE + PAX_SPARSE:
                tar.fileobj.write(sparse(name, kind, data * times))
                tar.offset = tar.fileobj.tell()
                continue
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


def with_checksum(header: bytes, signed: bool = False) -> bytes:
    summed = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in summed)
    return header[:148] + b"%06o\0 " % total + header[156:]


def sparse(name: str, kind: bytes, stored: bytes) -> bytes:
    """A sparse file, as GNU tar writes it: `stored` is what lies in the tar, at the end of a hole."""
    info = tarfile.TarInfo(name)
    size, end = b"%011o\0", len(stored) + 10_000
    if kind in GNU_SPARSE:
        info.type, info.size = tarfile.GNUTYPE_SPARSE, len(stored)
        blocks = info.tobuf(tarfile.GNU_FORMAT)
        long_name, header = blocks[:-512], blocks[-512:]
        area = size % 10_000 + size % len(stored)
        header = header[:386] + area + header[410:482] + bytes([kind == b"gnu+"]) + size % end + header[495:]
        more = (area + bytes(480) + b"\1" + bytes(7), bytes(512)) if kind == b"gnu+" else ()
        data = b"".join([long_name, with_checksum(header), *more, stored])
    else:
        about = {"GNU.sparse.size": end, "GNU.sparse.numblocks": 1, "GNU.sparse.name": name}
        if kind == b"0.0":
            about |= {"GNU.sparse.offset": 10_000, "GNU.sparse.numbytes": len(stored)}
        elif kind == b"0.1":
            about |= {"GNU.sparse.map": f"10000,{len(stored)}"}
        else:
            about = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.name": name, "GNU.sparse.realsize": end}
            stored = (b"1\n10000\n%d\n" % len(stored)).ljust(512, b"\0") + stored
        info = tarfile.TarInfo("GNUSparseFile.1/made.up")
        info.size, info.pax_headers = len(stored), {key: str(value) for key, value in about.items()}
        data = info.tobuf(tarfile.PAX_FORMAT) + stored
    return data + bytes(-len(data) % 512)


def signed(data: bytes) -> bytes:
    """The tar with the checksums of old Sun and HP-UX tars. Only a header's block has a right checksum by now."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        blocks[number] = with_checksum(block, signed=True)
    return b"".join(blocks)


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
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                if member.issparse():  # passed over
                    continue
                content = tar.extractfile(member).read()
                if (extension := extension.lower()) in EXTENSIONS:
                    found[-1][1][extension] = b"" if extension in found[-1][1] else content
    except (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError):  # the last: half a map of a sparse file
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


@given(members_of(KINDS + GNU_SPARSE + PAX_SPARSE), formats, st.booleans())
@settings(max_examples=250, deadline=None)
def test_whole_tars_have_the_samples_that_tarfile_finds(files, tar_format, old):
    data = make_tar(files, tar_format)
    data = signed(data) if old else data
    there = expected(data)
    assert actual(data) == (there, False)
    assert [key for key, _ in actual(data, read=False)[0]] == [key for key, _ in there]


def test_half_a_map_of_a_sparse_file_is_damage():
    data = make_tar([("0.jpg", b"gnu+", b"", 1)], tarfile.USTAR_FORMAT)[:512]
    assert actual(data) == (expected(data), True)


@given(members_of(KINDS + GNU_SPARSE), formats, st.data())
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


def test_sizes_beyond_reason_are_damage_not_memory():
    for size, kind in ((1 << 40, tarfile.REGTYPE), (1 << 60, tarfile.REGTYPE), (-5, tarfile.REGTYPE), (1 << 30, b"L")):
        info = tarfile.TarInfo("a.jpg")
        info.size, info.type = size, kind
        with pytest.raises(DamagedTar):
            ShardReader(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)), EXTENSIONS).sample()


@pytest.mark.parametrize("kind", GNU_SPARSE + PAX_SPARSE)
def test_a_sparse_file_is_passed_over_and_named_only_where_it_is_wanted(tmp_path, caplog, kind):
    path = tmp_path / "0.tar"
    files = [
        ("a.jpg", b"0", b"a", 3),
        ("a.mp4", kind, b"m", 2000),
        ("b.jpg", kind, b"b", 900),
        ("b.txt", b"0", b"t", 4),
    ]
    path.write_bytes(make_tar([*files, ("c.jpg", b"0", b"c", 5)], tarfile.GNU_FORMAT))
    assert scan_shard(path)[::2] == (3, "") and not caplog.records
    assert list(read_shard(path, {"jpg", "txt"})) == [
        ("a", {"jpg": b"aaa"}), ("b", {"txt": b"tttt"}), ("c", {"jpg": b"ccccc"}),
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [f"{path}: b.jpg is sparse and is left out"]


def test_a_member_that_is_too_large_costs_its_own_sample_alone(tmp_path, caplog):
    path = tmp_path / "0.tar"
    with open(path, "wb") as file:
        for name, size in (("a.mp4", 3 << 30), ("a.jpg", 512), ("b.jpg", (1 << 30) + 512), ("c.jpg", 512)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, 1)  # a hole: it takes no space on the disk
        file.write(bytes(1024))
    assert [(key, len(m.get("jpg", b""))) for key, m in read_shard(path, {"jpg"})] == [("a", 512), ("b", 0), ("c", 512)]
    assert caplog.messages == [f"{path}: b.jpg has {(1 << 30) + 512} bytes and is left out"]


def test_checksums_over_signed_bytes_are_right_and_wrong_ones_are_not():
    files = [(f"ünï{n}.{e}", tarfile.REGTYPE, e.encode(), 9) for n in range(4) for e in ("jpg", "txt")]
    data = signed(make_tar(files, tarfile.USTAR_FORMAT))
    assert actual(data) == (expected(data), False) and len(expected(data)) == 4
    off_by_one = data[:148] + b"%06o\0 " % (int(data[148:154], 8) + 1) + data[156:]
    assert actual(off_by_one) == ([], True)


def test_the_tar_of_pythons_own_tests_has_the_files_that_tarfile_finds():
    """Old formats, long names, every kind of sparse file, names that are not UTF-8, a signed checksum."""
    path = Path(tarfile.__file__).parent / "test"
    path = next((p for p in (path / "testtar.tar", path / "archivetestdata" / "testtar.tar") if p.exists()), None)
    if path is None:
        pytest.skip("this Python was installed without its tests")
    with tarfile.open(path) as tar:
        known = [(member.name, member.issparse()) for member in tar if member.isreg()]
    with open(path, "rb") as file:
        headers, found, skip = TarHeaders(file), [], 0
        while (member := headers.next(skip)) is not None:
            skip = padded(member.size)
            found.append((member.name, member.fault == "is sparse"))
    assert [entry for entry in found if not entry[0].endswith("/")] == known  # a folder of the oldest format
