"""A coded shift comes back as its level promises, and any other bytes are refused."""

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.config.constants import CODECS
from fedsigma.common.sigma.layout import Entry, Layout
from fedsigma.common.wire import quantization
from fedsigma.common.wire.codec import (
    HEADER_BYTES,
    LEVELS,
    SMALL_BITS,
    VERSION,
    CodecError,
    decode,
    download_level,
    encode,
    encode_update,
)


def layout_of(*blocks: int) -> Layout:
    entries, offset = [], 0
    for number, size in enumerate(blocks):
        entries.append(Entry(f"w{number}", "q", "image", number, offset, size, (0, size)))
        offset += size
    return Layout(tuple(entries))


TWO = layout_of(2)
MANY = layout_of(*[96] * 40)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda blocks: layout_of(*blocks))


@st.composite
def cases(draw: st.DrawFn, values: st.SearchStrategy[float] = finite) -> tuple[np.ndarray, Layout]:
    layout = draw(shapes)
    given_values = draw(st.lists(values, min_size=layout.size, max_size=layout.size))
    return np.array(given_values, dtype=np.float32), layout


moderate = st.floats(-1000, 1000, width=32)
levels = st.sampled_from(CODECS)


def per_block(vector: np.ndarray, layout: Layout) -> np.ndarray:
    """The largest magnitude of each value's matrix."""
    starts = np.cumsum((0, *layout.entry_sizes[:-1]))
    return np.repeat(np.maximum.reduceat(np.abs(vector), starts), layout.entry_sizes)


@given(cases())
def test_exact_is_bit_for_bit(case: tuple[np.ndarray, Layout]) -> None:
    vector, layout = case
    data = encode(vector, layout)
    back = decode(data, layout)
    assert back.tobytes() == vector.tobytes()
    assert len(data) == HEADER_BYTES + 4 * vector.size
    back += 1  # the result is the caller's own


@given(cases(st.floats(-(2.0**126), 2.0**126, width=32)))
def test_half_is_within_half_a_unit_of_the_matrixs_largest(case: tuple[np.ndarray, Layout]) -> None:
    vector, layout = case
    back = decode(encode(vector, layout, level="half"), layout).astype(np.float64)
    bound = 2.0**-11 * np.abs(vector) + 2.0**-24 * per_block(vector, layout) + 1e-45
    assert (np.abs(back - vector) <= bound).all()


@given(cases(moderate), st.integers(0, 2**64 - 1))
def test_int8_is_within_half_a_step(case: tuple[np.ndarray, Layout], seed: int) -> None:
    vector, layout = case
    back = decode(encode(vector, layout, level="int8", seed=seed), layout)
    # A step is the matrix's largest magnitude over 126, rounded up to the next eighth of an octave.
    step = np.maximum(per_block(vector, layout) / 126 * 2 ** (1 / 8), 2.0**-26)
    assert (np.abs(back - vector) <= 0.501 * step).all()
    assert (back[per_block(vector, layout) == 0] == 0).all()


@given(cases(moderate), levels, st.integers(0, 2**64 - 1))
def test_every_level_gives_finite_values_of_the_right_length(
    case: tuple[np.ndarray, Layout], level: str, seed: int
) -> None:
    vector, layout = case
    data = encode(vector, layout, level=level, seed=seed)
    assert data == encode(vector, layout, level=level, seed=seed)
    back = decode(data, layout, level=level)
    assert back.shape == vector.shape and back.dtype == np.float32 and np.isfinite(back).all()
    assert back.flags.writeable


def changes(seed: int, spread: float = 0.0) -> np.ndarray:
    """Values of matrices of different scale; a few lie far out if spread is large."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(np.exp(rng.normal(size=len(MANY.entry_sizes))), MANY.entry_sizes) * 1e-2
    return (scale * rng.normal(size=MANY.size) * np.exp(spread * rng.normal(size=MANY.size))).astype(
        np.float32
    )


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_small_keeps_to_its_size_whatever_the_values(spread: float) -> None:
    for seed in range(5):
        data = encode(changes(seed, spread), MANY, level="small", seed=seed)
        assert len(data) <= HEADER_BYTES + 9 + len(MANY.entry_sizes) + MANY.size * SMALL_BITS / 8 + 64
        error = decode(data, MANY) - changes(seed, spread)
        assert np.linalg.norm(error) < 0.35 * np.linalg.norm(changes(seed, spread))


def test_rounding_is_unbiased_and_as_small_as_dither_makes_it() -> None:
    vector, total = changes(1), np.zeros(MANY.size)
    for seed in range(400):
        total += (
            quantization.unpack(
                quantization.pack(vector, MANY.entry_sizes, seed, fraction=0.6)[0], MANY.entry_sizes
            )
            - vector
        )
    codes = np.frombuffer(quantization.pack(vector, MANY.entry_sizes, 0, fraction=0.6)[0], np.uint8, 40, 9)
    steps = np.repeat(2.0 ** (codes / 8 - 27), MANY.entry_sizes)
    # Each error is uniform over a step: variance step^2 / 12, so a mean of 400 is within five sigmas of zero.
    assert (np.abs(total / 400) < 5 * steps / np.sqrt(12 * 400)).all()
    error = (
        quantization.unpack(quantization.pack(vector, MANY.entry_sizes, 7, fraction=0.6)[0], MANY.entry_sizes)
        - vector
    )
    assert np.square(error / steps).mean() == pytest.approx(1 / 12, rel=0.05)


def test_dither_does_not_change_between_versions() -> None:
    # Of `openssl enc -chacha20` of zeros, with SHA-256 of "fedsigma dither" and 5 in 8 bytes as the key.
    known = [0.3079805430, 0.4076371596, -0.3360404060]
    assert quantization._dither(5, 3).tolist() == pytest.approx(known, abs=1e-8)


def test_an_old_version_is_refused_by_name() -> None:
    old = bytearray(encode(np.zeros(2), TWO))
    old[4] = 1
    with pytest.raises(CodecError, match=r"version 1, this FedSigma reads version 3"):
        decode(bytes(old), TWO)


@given(cases(moderate), levels, st.data())
def test_one_changed_byte_is_always_refused(
    case: tuple[np.ndarray, Layout], level: str, draw: st.DataObject
) -> None:
    vector, layout = case
    data = bytearray(encode(vector, layout, level=level))
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(CodecError):
        decode(bytes(data), layout)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_shift_or_a_codec_error(data: bytes) -> None:
    with contextlib.suppress(CodecError):
        decode(data, TWO)


@given(cases(moderate), levels, st.integers(0, 60))
def test_cut_bytes_are_refused(case: tuple[np.ndarray, Layout], level: str, cut: int) -> None:
    vector, layout = case
    data = encode(vector, layout, level=level)
    with pytest.raises(CodecError):
        decode(data[: max(0, len(data) - 1 - cut)], layout)


def forged(
    *,
    level: int = 1,
    values: int = 2,
    digest: str = TWO.digest,
    payload: bytes = b"\0" * 8,
    layout: Layout = TWO,
) -> bytes:
    """A message with a right checksum around wrong content, as only a faulty or hostile site would make."""
    header = struct.pack(
        "<4sBBHII32s", b"FSIG", VERSION, level, 0, values, len(payload), bytes.fromhex(digest)
    )
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload


def integers(raw: bytes, *, bits: int = 8, codes: bytes = b"\x80", **options: bool) -> bytes:
    """A payload of the quantised levels around these integers."""
    return struct.pack("<QB", 1, bits) + codes + zstandard.ZstdCompressor(**options).compress(raw)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (forged(level=9), "unknown level 9"),
        (forged(values=3), "3 values, this study's layout has 2"),
        (forged(digest="cd" * 32), "layout cdcdcdcdcdcd, this study has"),
        (forged(payload=b"\0" * 12), "12 bytes, 2 float32 values take 8"),
        (forged(payload=struct.pack("<2f", 1.0, float("nan"))), "not finite"),
        (forged(payload=struct.pack("<2f", 1.0, float("inf"))), "not finite"),
        (forged(level=2, payload=b"\0" * 4), "4 bytes, expected 5"),
        (forged(level=2, payload=b"\x7f" + struct.pack("<2e", 1.0, 65504.0)), "not finite"),
        (forged(level=2, payload=b"\0" + struct.pack("<2e", 1.0, float("nan"))), "not finite"),
        (forged(level=3, payload=b"\0" * 9), "9 bytes, expected at least 10"),
        (forged(level=3, payload=integers(b"ab", bits=5)), "5 bits are not known"),
        (forged(level=3, payload=integers(b"abc")), "not 2 bytes"),
        (forged(level=4, payload=integers(b"ab", bits=4)), "not 1 bytes"),
        (forged(level=3, payload=integers(b"ab", write_content_size=False)), "not 2 bytes"),
        (forged(level=3, payload=integers(b"ab", write_checksum=True)), "not in the expected form"),
        (forged(level=3, payload=integers(b"ab") + b"x"), "damaged integers"),
        (forged(level=3, payload=integers(b"ab")[:-1]), "damaged integers"),
        (forged(level=3, payload=integers(b"")[:10] + b"nonsense"), "damaged integers"),
        (b"", "shorter than its header"),
        (b"PK" + forged()[2:], "not a coded shift"),
    ],
)
def test_forged_messages_are_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        decode(data, TWO)


def test_a_bomb_takes_no_memory() -> None:
    bomb = forged(level=3, payload=integers(b"\0" * 200_000_000))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(CodecError, match="not 2 bytes"):
        decode(bomb, TWO)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.binary(max_size=120), st.booleans())
def test_any_payload_gives_a_shift_or_a_codec_error(level: int, body: bytes, framed: bool) -> None:
    layout = layout_of(3, 5)
    payload = integers(body, codes=b"\x80\0", bits=4 if len(body) % 2 else 8) if framed else body
    with contextlib.suppress(CodecError):
        data = forged(level=level, values=8, digest=layout.digest, payload=payload)
        vector = decode(data, layout)
        assert vector.shape == (8,) and np.isfinite(vector).all()


def test_update_that_cannot_be_encoded() -> None:
    with pytest.raises(CodecError, match="not finite"):
        encode(np.array([np.inf, 0]), TWO)
    with pytest.raises(CodecError, match=r"shape \(2, 2\) cannot be coded, expected \(2,\)"):
        encode(np.zeros((2, 2)), TWO)
    with pytest.raises(CodecError, match="'tiny' is unknown: known are exact, half, int8, small"):
        encode(np.zeros(2), TWO, level="tiny")
    for level in ("half", "int8", "small"):
        with pytest.raises(CodecError, match="too large to be coded"):
            encode(np.array([2e38, 0]), TWO, level=level)


def test_only_the_asked_level_is_accepted() -> None:
    data = encode(np.ones(2), TWO, level="half")
    assert decode(data, TWO).tolist() == decode(data, TWO, level="half").tolist() == [1, 1]
    with pytest.raises(CodecError, match="not 'exact'"):
        decode(data, TWO, level="exact")


def test_the_levels_table_is_consistent() -> None:
    assert tuple(LEVELS) == CODECS
    assert len({level.number for level in LEVELS.values()}) == len(LEVELS)
    assert [download_level(name) for name in CODECS] == ["exact", "half", "int8", "int8"]


@pytest.mark.parametrize("level", CODECS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_residual_is_what_decoding_lacks(level: str, seed: int) -> None:
    update, residual = changes(seed), changes(seed + 1) / 10
    data, lost = encode_update(update, residual, MANY, level=level, seed=seed)
    assert data == encode(update + residual, MANY, level=level, seed=seed)
    np.testing.assert_array_equal(lost, update + residual - decode(data, MANY))
