"""A sigma shift as bytes on the wire, and back.

A coded shift is a fixed header and a payload. The header says which coding level made the payload, how many
values it holds and for which layout, and carries a checksum over everything else, so that decoding is total:
any bytes give either the shift or a `CodecError`, and no more memory is used than for one shift.

Header, little endian, 52 bytes: magic `FSIG`, version (1 byte), level (1 byte), two zero bytes, number of
values (4), length of the payload (4), layout digest (32), CRC-32 of all bytes but itself (4).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import CODECS
from fedsigma.common.wire import quantization
from fedsigma.common.wire.quantization import CodecError

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["HEADER_BYTES", "MAX_VALUES", "CodecError", "decode", "download_level", "encode", "encode_update"]

MAGIC = b"FSIG"
VERSION = 3
# Far above any backbone's layout (about 100,000 values); bounds the memory that a header can ask for.
MAX_VALUES = 1_000_000
_HEADER = struct.Struct("<4sBBHII32s")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

Vector = NDArray[np.float32]
Blocks = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One way of coding.

    Attributes:
        number: The level's number in the header.
        pack: Encodes values, given the sizes of the matrices and a seed; returns the payload and the values
            that `unpack` reads from it.
        unpack: Decodes a payload, given the sizes of the matrices.
        download: The level of the shift that the server sends: it has no error feedback.
    """

    number: int
    pack: Callable[[Vector, Blocks, int], tuple[bytes, Vector]]
    unpack: Callable[[bytes, Blocks], Vector]
    download: str


def download_level(level: str) -> str:
    """The level of the server's own messages in a study whose sites code in `level`."""
    return LEVELS[level].download


def encode(shift: NDArray[np.floating], layout: Layout, *, level: str = "exact", seed: int = 0) -> bytes:
    """Code a shift or an update.

    Args:
        shift: Finite values of any floating type, shape (layout.size,).
        layout: Which matrices the values belong to.
        level: One of `CODECS`.
        seed: Seed of the random rounding, another for each message.

    Raises:
        CodecError: The level is unknown, the shift is not of this layout, or a value cannot be coded.
    """
    return _encode(shift, layout, level, seed)[0]


def encode_update(
    update: Vector, residual: Vector, layout: Layout, *, level: str, seed: int
) -> tuple[bytes, Vector]:
    """Code an update with error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).

    The residual of the last update, shape (layout.size,), is added to this one. Returns the encoded update
    and the new residual: `update + residual` minus the decoded values. The rest is as for `encode`.
    """
    corrected = update + residual
    data, values = _encode(corrected, layout, level, seed)
    return data, corrected - values


def _encode(shift: NDArray[np.floating], layout: Layout, level: str, seed: int) -> tuple[bytes, Vector]:
    """The coded shift, and the values that `decode` reads from it."""
    if level not in LEVELS:
        raise CodecError(f"codec level '{level}' is unknown: known are {', '.join(LEVELS)}")
    vector = np.ascontiguousarray(shift, dtype=np.float32)
    if vector.shape != (layout.size,) or vector.size > MAX_VALUES:
        raise CodecError(f"a shift of shape {vector.shape} cannot be coded, expected ({layout.size},)")
    if not bool(np.isfinite(vector).all()):
        raise CodecError("the shift holds a value that is not finite: lower the learning rate")
    coding = LEVELS[level]
    payload, values = coding.pack(vector, layout.entry_sizes, seed)
    digest = bytes.fromhex(layout.digest)
    header = _HEADER.pack(MAGIC, VERSION, coding.number, 0, vector.size, len(payload), digest)
    return header + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) + payload, values


def decode(data: bytes, layout: Layout, *, level: str | None = None) -> Vector:
    """Decode a sigma shift of a known layout: shape (layout.size,), float32, writable.

    Args:
        data: The encoded shift.
        layout: The expected layout.
        level: The only level to accept; None accepts all.

    Raises:
        CodecError: The bytes are cut, damaged, or of another version, level, layout or length.
    """
    number, payload = _payload(data, layout)
    name = next((name for name, known in LEVELS.items() if known.number == number), None)
    if name is None or level not in (None, name):
        raise CodecError(
            f"the coding level {number} is not '{level}'" if level else f"unknown level {number}"
        )
    vector = LEVELS[name].unpack(payload, layout.entry_sizes)
    if not bool(np.isfinite(vector).all()):
        raise CodecError("the shift holds a value that is not finite")
    return vector


def _payload(data: bytes, layout: Layout) -> tuple[int, bytes]:
    """The level's number and the payload of a message whose header is in order."""
    if not isinstance(data, bytes) or len(data) < HEADER_BYTES:
        raise CodecError("the coded shift is shorter than its header")
    magic, version, number, reserved, values, length, digest = _HEADER.unpack_from(data)
    if magic != MAGIC or reserved != 0:
        raise CodecError("these bytes are not a coded shift")
    if version != VERSION:
        raise CodecError(
            f"the shift is coded in version {version}, this FedSigma reads version {VERSION}:"
            " both sides must run the same FedSigma"
        )
    payload = data[HEADER_BYTES:]
    if len(payload) != length:
        raise CodecError(f"the payload has {len(payload)} bytes, its header says {length}")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != zlib.crc32(payload, zlib.crc32(data[: _HEADER.size])):
        raise CodecError("the checksum does not fit: the bytes were damaged on the way")
    if digest.hex() != layout.digest:
        raise CodecError(
            f"the shift is of layout {digest.hex()[:12]}, this study has {layout.digest[:12]}:"
            " the backbone or the selection of weights differs"
        )
    if values != layout.size:
        raise CodecError(f"the shift has {values} values, this study's layout has {layout.size}")
    return number, payload


def _pack_exact(vector: Vector, blocks: Blocks, seed: int) -> tuple[bytes, Vector]:
    return vector.astype("<f4").tobytes(), vector


def _unpack_exact(payload: bytes, blocks: Blocks) -> Vector:
    values = sum(blocks)
    if len(payload) != 4 * values:
        raise CodecError(f"the payload has {len(payload)} bytes, {values} float32 values take {4 * values}")
    # A copy in native byte order: frombuffer's view is read-only.
    return np.frombuffer(payload, dtype="<f4").astype(np.float32)


def _pack_small(vector: Vector, blocks: Blocks, seed: int) -> tuple[bytes, Vector]:
    most = int(vector.size * SMALL_BITS / 8) + 64
    return quantization.pack(vector, blocks, seed, fraction=SMALL_STEP, most_bytes=most)


SMALL_BITS = 2.78
"""Most bits a value for the integers of the level small; steps grow until they fit."""
SMALL_STEP = 0.4
"""Smallest step of the level small, as a share of a matrix's root mean square."""

LEVELS: dict[str, Level] = {
    "exact": Level(number=1, pack=_pack_exact, unpack=_unpack_exact, download="exact"),
    "half": Level(
        number=2,
        pack=lambda vector, blocks, seed: quantization.pack_half(vector, blocks),
        unpack=quantization.unpack_half,
        download="half",
    ),
    "int8": Level(number=3, pack=quantization.pack, unpack=quantization.unpack, download="int8"),
    "small": Level(number=4, pack=_pack_small, unpack=quantization.unpack, download="int8"),
}
assert tuple(LEVELS) == CODECS
