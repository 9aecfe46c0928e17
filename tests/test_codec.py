"""A coded shift comes back bit for bit, and no other bytes decode."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common import codec
from fedsigma.common.codec import HEADER_BYTES, CodecError, Level, decode, encode

DIGEST = "ab" * 32
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(finite, min_size=1, max_size=40).map(lambda values: np.array(values, dtype=np.float32))


@given(vectors)
def test_exact_is_bit_for_bit(vector: np.ndarray) -> None:
    data = encode(vector, layout_digest=DIGEST)
    back = decode(data, layout_digest=DIGEST, size=vector.size)
    assert back.tobytes() == vector.tobytes()
    assert len(data) == HEADER_BYTES + 4 * vector.size
    back += 1  # the result is the caller's own


@given(vectors, st.data())
def test_one_changed_byte_is_always_refused(vector: np.ndarray, draw: st.DataObject) -> None:
    data = bytearray(encode(vector, layout_digest=DIGEST))
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(CodecError):
        decode(bytes(data), layout_digest=DIGEST, size=vector.size)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_shift_or_a_codec_error(data: bytes) -> None:
    with contextlib.suppress(CodecError):
        decode(data, layout_digest=DIGEST, size=4)


@given(vectors, st.integers(0, 60))
def test_cut_bytes_are_refused(vector: np.ndarray, cut: int) -> None:
    data = encode(vector, layout_digest=DIGEST)
    with pytest.raises(CodecError):
        decode(data[: max(0, len(data) - 1 - cut)], layout_digest=DIGEST, size=vector.size)


def forged(*, level: int = 1, values: int = 2, digest: str = DIGEST, payload: bytes = b"\0" * 8) -> bytes:
    """A message with a right checksum around wrong content, as only a faulty or hostile site would make."""
    header = struct.pack("<4sBBHII32s", b"FSIG", 1, level, 0, values, len(payload), bytes.fromhex(digest))
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (forged(level=9), "unknown level 9"),
        (forged(values=3), "3 values, this study's layout has 2"),
        (forged(digest="cd" * 32), "layout cdcdcdcdcdcd, this study has abababababab"),
        (forged(payload=b"\0" * 12), "12 bytes, 2 float32 values take 8"),
        (forged(payload=struct.pack("<2f", 1.0, float("nan"))), "not finite"),
        (forged(payload=struct.pack("<2f", 1.0, float("inf"))), "not finite"),
        (b"", "shorter than its header"),
        (b"PK" + forged()[2:], "not a coded shift"),
    ],
)
def test_forged_messages_are_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        decode(data, layout_digest=DIGEST, size=2)


def test_what_cannot_be_coded() -> None:
    with pytest.raises(CodecError, match="not finite"):
        encode(np.array([np.inf], dtype=np.float32), layout_digest=DIGEST)
    with pytest.raises(CodecError, match="shape"):
        encode(np.zeros((2, 2), dtype=np.float32), layout_digest=DIGEST)
    with pytest.raises(CodecError, match="'tiny' is not known: known are exact"):
        encode(np.zeros(2, dtype=np.float32), layout_digest=DIGEST, level="tiny")
    with pytest.raises(CodecError, match="64 hex digits"):
        encode(np.zeros(2, dtype=np.float32), layout_digest="xyz")


def test_a_level_is_registered_once_and_only_the_asked_level_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec, "_levels", dict(codec._levels))
    half = Level(
        name="half",
        number=7,
        pack=lambda vector: vector.astype("<f2").tobytes(),
        unpack=lambda payload, values: np.frombuffer(payload, "<f2").astype(np.float32),
    )
    codec.register(half)
    with pytest.raises(ValueError, match="clashes"):
        codec.register(half)
    data = encode(np.ones(3, dtype=np.float32), layout_digest=DIGEST, level="half")
    assert decode(data, layout_digest=DIGEST, size=3).tolist() == [1, 1, 1]
    with pytest.raises(CodecError, match="not 'exact'"):
        decode(data, layout_digest=DIGEST, size=3, level="exact")
