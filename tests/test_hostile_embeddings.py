"""Odd and hostile embeddings: used as numpy reads them, or left out for one of three reasons."""

import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.text.embeddings import from_bytes, to_bytes
from data.text.meta import TextMeta

REASONS = {"embedding not readable", "embedding of another shape or dtype", "embedding not finite"}
TOKENS, DIM = 4, 6


def meta(dtype: str = "float16", tokens: int = TOKENS, dim: int = DIM) -> TextMeta:
    return TextMeta("none", "0", "0", tokens, dim, dtype, "float32", "none")


def states(dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(0).standard_normal((TOKENS, DIM)).astype(dtype)


def npy(header: bytes, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body


def saved(array: np.ndarray, version: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_run(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="embedding not readable"):
        from_bytes(buffer.getvalue(), meta())
    assert not (tmp_path / "ran").exists()
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    assert (tmp_path / "ran").exists(), "the bomb is a real one"


GOOD = to_bytes(states())
REFUSED = {
    "nothing": (b"", "embedding not readable"),
    "a zip": (b"PK\3\4" + bytes(60), "embedding not readable"),
    "cut in its header": (GOOD[:50], "embedding not readable"),
    "cut in its data": (GOOD[:-1], "embedding not readable"),
    "cut in its data, another order": (to_bytes(np.asfortranarray(states()))[:-1], "embedding not readable"),
    "an unknown version": (GOOD[:6] + b"\7" + GOOD[7:], "embedding not readable"),
    "a header that is code": (npy(b"__import__('os').system('true')\n"), "embedding not readable"),
    "a header of brackets": (npy(b"(" * 9000), "embedding not readable"),
    "one token more": (to_bytes(np.zeros((TOKENS + 1, DIM), np.float16)), "embedding of another shape or dtype"),
    "turned": (to_bytes(states().T.copy()), "embedding of another shape or dtype"),
    "a batch of one": (to_bytes(states()[None]), "embedding of another shape or dtype"),
    "float32": (to_bytes(states("float32")), "embedding of another shape or dtype"),
    "complex": (to_bytes(states().astype(np.complex64)), "embedding of another shape or dtype"),
    "a number": (to_bytes(np.float16(1)), "embedding of another shape or dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_for_its_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        from_bytes(data, meta())
    assert str(refused.value) == reason


def test_a_header_of_a_terabyte_takes_no_memory():
    data = npy(b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000, 1000000), }\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="embedding of another shape or dtype"):
            from_bytes(data, meta())
        with pytest.raises(ValueError, match="embedding not readable"):
            from_bytes(data, meta(tokens=1000000, dim=1000000))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_is_what_numpy_reads_whoever_wrote_it(dtype):
    expected = states(dtype)
    swapped = expected.astype(expected.dtype.newbyteorder())
    files = [to_bytes(expected), to_bytes(np.asfortranarray(expected)), to_bytes(swapped), saved(expected, (2, 0))]
    assert len(set(files)) == 4
    for data in files:
        found = from_bytes(data, meta(dtype))
        assert found.dtype == np.dtype(dtype) and found.dtype.isnative and found.flags.c_contiguous
        assert (found == np.load(io.BytesIO(data))).all() and (found == expected).all()


def test_every_float16_is_finite_or_not_as_numpy_says():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for value in values:
        check_finite(np.array([[0, value]], np.float16))


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.booleans())
def test_any_float32_is_finite_or_not_as_numpy_says(values, fortran):
    array = np.array([values], np.float32)
    check_finite(np.asfortranarray(array.reshape(-1, 1)) if fortran else array)


def check_finite(array: np.ndarray) -> None:
    fits = meta(array.dtype.name, *array.shape)
    if np.isfinite(array).all():
        assert (from_bytes(to_bytes(array), fits) == array).all()
    else:
        with pytest.raises(ValueError, match="embedding not finite"):
            from_bytes(to_bytes(array), fits)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([0, 6, 10, 60, 128, len(GOOD)]), st.binary(max_size=80), st.integers(0, len(GOOD)))
def test_any_bytes_are_an_embedding_or_bad_for_a_known_reason(start, what, then):
    for data in (GOOD[:start] + what, GOOD[:start] + what + GOOD[start + len(what) : then]):
        try:
            found = from_bytes(data, meta())
        except ValueError as bad:
            assert str(bad) in REASONS
        else:
            assert found.shape == (TOKENS, DIM) and np.isfinite(found).all()


def test_every_reason_is_in_the_table(repo):
    page = (repo / "docs/reference/hostile_input.md").read_text(encoding="utf-8")
    assert not [reason for reason in REASONS if f"`{reason}`" not in page]
