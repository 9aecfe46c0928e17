"""Sigma shifts in a few bits a value: a step for each weight matrix, dithered rounding, entropy coding.

A value x of a matrix with step h becomes the integer q = round(x / h + u) and is read as (q - u) h, where u
is uniform in [-1/2, 1/2) and drawn by both ends from one seed (subtractive dither; Gray and Stockham, IEEE
Transactions on Information Theory 39(3), 1993). This is stochastic rounding whose randomness the reader
takes away again: the error is uniform and does not depend on x, its mean is zero and its variance h^2 / 12,
where plain stochastic rounding has h^2 / 6 on average.

The integers go through zstandard, two to a byte where they are small. That takes one or two per cent more
than a range coder (`bench/wire.py`), by a library that is kept better and read by more.

Payload: the seed (8 bytes, little endian), bits an integer (1 byte: 4 or 8), a step code for each matrix
(1 byte), the compressed integers.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["CodecError", "pack", "pack_half", "unpack", "unpack_half"]

Vector = NDArray[np.float32]
Blocks = tuple[int, ...]

# Steps are 2^(code / 8 - 27), 1.5e-8 to 29; code 0 marks a matrix of zeros.
_STEPS = np.array([2.0 ** (code / 8 - 27) for code in range(256)])
# Leaves room for the dither in a signed byte.
_LARGEST = 126
_START = struct.Struct("<QB")
_COARSEST = 4.0
_PIECE = 16_384
_TOO_LARGE = "a value of the shift is too large to be coded: lower the learning rate"


class CodecError(FedSigmaError, ValueError):
    """Bytes are not a coded sigma shift of the expected layout, or a shift cannot be coded."""


def pack(
    vector: Vector, blocks: Blocks, seed: int, *, fraction: float = 0.0, most_bytes: int = 0
) -> tuple[bytes, Vector]:
    """Quantise a vector.

    Args:
        vector: Finite values, shape (sum of blocks,), float32.
        blocks: Number of values of each matrix.
        seed: Seed of the dither, below 2^64, another for each message of a study.
        fraction: Smallest step as a share of a matrix's root mean square; 0 for the smallest whose integers
            fit a byte.
        most_bytes: If positive, steps grow until the compressed integers take at most this many bytes, up to
            four times the root mean square.

    Returns:
        The payload, and the values that `unpack` reads from it, shape (sum of blocks,).

    Raises:
        CodecError: A value is above about 3,700.
    """
    x, starts = vector.astype(np.float64), np.cumsum((0, *blocks[:-1]))
    largest = np.maximum.reduceat(np.abs(x), starts)
    typical = np.sqrt(np.add.reduceat(x * x, starts) / np.array(blocks))
    if largest.max() > _LARGEST * _STEPS[-1]:
        raise CodecError(_TOO_LARGE)
    while True:
        codes = _codes(np.maximum(fraction * typical, largest / _LARGEST))
        scaled = np.rint(x / np.repeat(_STEPS[codes], blocks) + _dither(seed, x.size))
        integers = np.where(np.repeat(codes == 0, blocks), 0, scaled).astype(np.int8)
        bits, compressed = _compress(integers)
        if not 0 < most_bytes < len(compressed) or fraction >= _COARSEST:
            payload = _START.pack(seed, bits) + codes.tobytes() + compressed
            return payload, _values(integers, codes, blocks, seed)
        fraction = max(fraction, 0.1) * 2 ** (1 / 8)


def _codes(steps: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The code of the next larger step; 0 for 0."""
    with np.errstate(divide="ignore"):
        codes = np.ceil(8 * (np.log2(steps) + 27))
    return np.where(steps > 0, codes.clip(1, 255), 0).astype(np.uint8)


def _compress(integers: NDArray[np.int8]) -> tuple[int, bytes]:
    """Return the bits of an integer before compression, and the compressed integers."""
    bits = 4 if integers.min() >= -8 and integers.max() <= 7 else 8
    raw = _pair(integers) if bits == 4 else integers.tobytes()
    coder = zstandard.ZstdCompressor(level=19, write_checksum=False, write_content_size=True)
    return bits, coder.compress(raw)


def unpack(payload: bytes, blocks: Blocks) -> Vector:
    """Decode a payload of `pack`, shape (sum of blocks,), float32; takes no more memory than a valid one.

    Raises:
        CodecError: The payload is invalid for these blocks.
    """
    head = _START.size + len(blocks)
    if len(payload) < head:
        raise CodecError(f"the payload has {len(payload)} bytes, expected at least {head}")
    seed, bits = _START.unpack_from(payload)
    values = sum(blocks)
    if bits not in (4, 8):
        raise CodecError(f"integers of {bits} bits are not known: expected 4 or 8")
    raw = _decompress(payload[head:], values if bits == 8 else (values + 1) // 2)
    integers = np.frombuffer(raw, np.int8) if bits == 8 else _unpair(raw, values)
    codes = np.frombuffer(payload, np.uint8, len(blocks), _START.size)
    return _values(integers, codes, blocks, seed)


def _values(integers: NDArray[np.int8], codes: NDArray[np.uint8], blocks: Blocks, seed: int) -> Vector:
    """The values of integers, shape (sum of blocks,): (integer - dither) times the step of the matrix."""
    size = len(integers)
    steps, owners, drawn = _STEPS[codes], _owners(blocks), _draw(seed, size)
    values = np.empty(size, np.float32)
    # In pieces: to the allocator, new arrays of all values in float64 cost more than what is done with them.
    for start in range(0, size, _PIECE):
        part = slice(start, start + _PIECE)
        scaled = integers[part] - _uniform(drawn[part])
        scaled *= steps[owners[part]]
        values[part] = scaled
    if not codes.all():
        values[(codes == 0)[owners]] = 0.0
    return values


@lru_cache(maxsize=4)
def _owners(blocks: Blocks) -> NDArray[np.intp]:
    """Return the index of each value's matrix."""
    return np.repeat(np.arange(len(blocks)), blocks)


def _decompress(data: bytes, size: int) -> bytes:
    """Decompress the one frame in `data`, which must state and hold `size` bytes."""
    try:
        # Checked first: the decompressor allocates what the frame asks for.
        if zstandard.frame_content_size(data) != size:
            raise CodecError(f"the compressed integers are not {size} bytes")
        frame = zstandard.get_frame_parameters(data)
        if frame.window_size > 2**23 or frame.dict_id or frame.has_checksum:
            raise CodecError("the compressed integers are not in the expected form")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise error if isinstance(error, CodecError) else CodecError("damaged integers") from error
    if len(raw) != size:
        raise CodecError(f"{len(raw)} bytes came out of the compressed integers, expected {size}")
    return raw


def _pair(integers: NDArray[np.int8]) -> bytes:
    nibbles = np.zeros(2 * ((integers.size + 1) // 2), np.uint8)
    nibbles[: integers.size] = (integers + 8).astype(np.uint8)
    return (16 * nibbles[::2] + nibbles[1::2]).astype(np.uint8).tobytes()


def _unpair(raw: bytes, values: int) -> NDArray[np.int8]:
    pairs = np.frombuffer(raw, np.uint8)
    return (np.stack([pairs >> 4, pairs & 15], 1).ravel()[:values].astype(np.int8)) - np.int8(8)


def _dither(seed: int, values: int) -> NDArray[np.float64]:
    """Uniform values in [-1/2, 1/2), the same on every machine; numpy promises no stream for ever."""
    return _uniform(_draw(seed, values))


def _draw(seed: int, values: int) -> NDArray[np.uint32]:
    """Draw from the key stream of ChaCha20 (RFC 8439)."""
    key = hashlib.sha256(b"fedsigma dither" + seed.to_bytes(8, "little")).digest()
    # A key for each seed, so counter and nonce may be zero.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * values)), "<u4")


def _uniform(drawn: NDArray[np.uint32]) -> NDArray[np.float64]:
    values = drawn / 2**32
    values -= 0.5
    return values


def pack_half(vector: Vector, blocks: Blocks) -> tuple[bytes, Vector]:
    """Code a vector as float16 of each value over a power of two that fits its matrix (1 byte each).

    Returns as `pack`.

    Raises:
        CodecError: A value is 2^127 or more.
    """
    starts = np.cumsum((0, *blocks[:-1]))
    largest = np.maximum.reduceat(np.abs(vector), starts)
    if largest.max() >= 2.0**127:
        raise CodecError(_TOO_LARGE)
    _, exponents = np.frexp(largest)
    exponents = exponents.clip(-126, None).astype(np.int8)
    scaled = np.ldexp(vector, -np.repeat(exponents.astype(np.int32), blocks)).astype("<f2")
    payload = exponents.tobytes() + scaled.tobytes()
    return payload, _half_values(scaled, exponents, blocks)


def unpack_half(payload: bytes, blocks: Blocks) -> Vector:
    """Decode a payload of `pack_half`, as `unpack`."""
    values, head = sum(blocks), len(blocks)
    if len(payload) != head + 2 * values:
        raise CodecError(f"the payload has {len(payload)} bytes, expected {head + 2 * values}")
    exponents = np.frombuffer(payload, np.int8, head)
    return _half_values(np.frombuffer(payload, "<f2", values, head), exponents, blocks)


def _half_values(scaled: NDArray[np.float16], exponents: NDArray[np.int8], blocks: Blocks) -> Vector:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        powers = np.repeat(exponents.astype(np.int32), blocks)
        return np.ldexp(scaled.astype(np.float32), powers).astype(np.float32)
