"""A sigma shift as bytes on the wire, and back.

A coded shift is a fixed header and a payload. The header says which coding level made the payload, how many
values it holds and for which layout, and carries a checksum over everything else, so that decoding is total:
any bytes give either the shift or a `CodecError`.

Header, little endian, 52 bytes: magic `FSIG`, version (1 byte), level (1 byte), two zero bytes, number of
values (4), length of the payload (4), layout digest (32), CRC-32 of all bytes but itself (4).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEADER_BYTES", "MAX_VALUES", "CodecError", "Level", "decode", "encode", "level_names", "register"]

MAGIC = b"FSIG"
VERSION = 1
# Far above any backbone's layout (about 100,000 values); bounds the memory that a header can ask for.
MAX_VALUES = 1_000_000
_HEADER = struct.Struct("<4sBBHII32s")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

Vector = NDArray[np.float32]


class CodecError(ValueError):
    """Bytes are not a coded sigma shift of the expected layout, or a shift cannot be coded."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One way of coding: pack turns float32 values into a payload, unpack(payload, values) turns it back.

    Shapes: the vector is (values,), float32. unpack raises CodecError for a payload it cannot read.
    """

    name: str
    number: int
    pack: Callable[[Vector], bytes]
    unpack: Callable[[bytes, int], Vector]


_levels: dict[str, Level] = {}


def register(level: Level) -> None:
    """Add a coding level.

    Raises:
        ValueError: its name or number is taken, or the number does not fit one byte.
    """
    taken = [known.name for known in _levels.values() if known.number == level.number]
    if level.name in _levels or taken or not 1 <= level.number <= 255:
        raise ValueError(f"codec level '{level.name}' ({level.number}) clashes with {taken or level.name}")
    _levels[level.name] = level


def level_names() -> tuple[str, ...]:
    """Return the names of the coding levels."""
    return tuple(_levels)


def encode(shift: NDArray[np.floating], *, layout_digest: str, level: str = "exact") -> bytes:
    """Code a sigma shift.

    Shapes: shift (layout size,), any floating type.

    Raises:
        CodecError: the level is not known, the shift is not a vector, or a value of it is not finite.
    """
    if level not in _levels:
        raise CodecError(f"codec level '{level}' is not known: known are {', '.join(_levels)}")
    vector = np.ascontiguousarray(shift, dtype=np.float32)
    if vector.ndim != 1 or not 0 < vector.size <= MAX_VALUES:
        raise CodecError(
            f"a shift of shape {vector.shape} cannot be coded, expected 1 to {MAX_VALUES} values"
        )
    if not bool(np.isfinite(vector).all()):
        raise CodecError("the shift holds a value that is not finite: lower the learning rate")
    payload = _levels[level].pack(vector)
    number = _levels[level].number
    header = _HEADER.pack(MAGIC, VERSION, number, 0, vector.size, len(payload), _digest(layout_digest))
    return header + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


def decode(data: bytes, *, layout_digest: str, size: int, level: str | None = None) -> Vector:
    """Decode a sigma shift of a known layout.

    Shapes: returns (size,), float32, writable.

    Args:
        data: the coded shift.
        layout_digest: the digest of the layout it must be of, as hex.
        size: the number of values of that layout.
        level: the only coding level to accept; None accepts every known one.

    Raises:
        CodecError: the bytes are cut, damaged, of another version, level, layout or length.
    """
    if not isinstance(data, bytes) or len(data) < HEADER_BYTES:
        raise CodecError("the coded shift is shorter than its header")
    magic, version, number, reserved, values, length, digest = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise CodecError(f"not a coded shift of version {VERSION}: both sides must run the same FedSigma")
    payload = data[HEADER_BYTES:]
    if len(payload) != length:
        raise CodecError(f"the payload has {len(payload)} bytes, its header says {length}")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != zlib.crc32(payload, zlib.crc32(data[: _HEADER.size])):
        raise CodecError("the checksum does not fit: the bytes were damaged on the way")
    if digest != _digest(layout_digest):
        raise CodecError(
            f"the shift is of layout {digest.hex()[:12]}, this study has {layout_digest[:12]}:"
            " the backbone or the selection of weights differs"
        )
    if values != size:
        raise CodecError(f"the shift has {values} values, this study's layout has {size}")
    known = {item.number: item for item in _levels.values()}
    if number not in known or level not in (None, known[number].name):
        raise CodecError(
            f"the coding level {number} is not '{level}'" if level else f"unknown level {number}"
        )
    vector = known[number].unpack(payload, values)
    if vector.shape != (size,) or vector.dtype != np.float32:
        raise CodecError(f"the payload gave {vector.dtype} {vector.shape}, expected float32 ({size},)")
    if not bool(np.isfinite(vector).all()):
        raise CodecError("the shift holds a value that is not finite")
    return vector


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise CodecError(f"the layout digest is '{text[:80]}', expected 64 hex digits")
    return digest


def _pack_exact(vector: Vector) -> bytes:
    return vector.astype("<f4").tobytes()


def _unpack_exact(payload: bytes, values: int) -> Vector:
    if len(payload) != 4 * values:
        raise CodecError(f"the payload has {len(payload)} bytes, {values} float32 values take {4 * values}")
    # A copy in native byte order: frombuffer's view is read-only.
    return np.frombuffer(payload, dtype="<f4").astype(np.float32)


register(Level(name="exact", number=1, pack=_pack_exact, unpack=_unpack_exact))
