"""Feed the decoder of shifts with hostile bytes: each input must give a shift or a `CodecError`.

    python -m bench.fuzz_wire --inputs 200000 --json out/fuzz.json

Four kinds in equal numbers, drawn by hypothesis: any bytes; any payload, often of a valid length, behind a
valid header and checksum; any integers, correctly compressed, behind valid step codes; and valid messages
with a few bytes changed and the checksum corrected. Any other exception, a wrong shape, a value that is not
finite, or more than 16 MiB of additional memory ends the run with code 1 and prints the input.
"""

from __future__ import annotations

import collections
import struct
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.harness import Table, argument_parser, parse_arguments, write_json
from fedsigma.common.config.constants import CODECS
from fedsigma.common.sigma.layout import Entry, Layout
from fedsigma.common.wire.codec import HEADER_BYTES, LEVELS, MAGIC, VERSION, CodecError, decode, encode

BLOCKS = (5, 1, 30, 12)
MAX_MEMORY = 16 * 2**20


def small_layout() -> Layout:
    """Return a small layout of several matrices."""
    starts = np.cumsum((0, *BLOCKS[:-1])).tolist()
    return Layout(
        tuple(
            Entry(f"w{n}", "q", "image", n, start, size, (0, size))
            for n, (start, size) in enumerate(zip(starts, BLOCKS, strict=True))
        )
    )


LAYOUT = small_layout()


def sealed(level: int, payload: bytes, *, values: int = LAYOUT.size) -> bytes:
    """Return a message with a valid header and checksum around any payload."""
    digest = bytes.fromhex(LAYOUT.digest)
    header = struct.pack("<4sBBHII32s", MAGIC, VERSION, level, 0, values, len(payload), digest)
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload


numbers = st.one_of(st.sampled_from([level.number for level in LEVELS.values()]), st.integers(0, 255))

fitting = st.sampled_from([4 * LAYOUT.size, len(BLOCKS) + 2 * LAYOUT.size]).flatmap(
    lambda length: st.binary(min_size=length, max_size=length)
)


@st.composite
def compressed(draw: st.DrawFn) -> bytes:
    """Any integers, compressed as `encode` does, of a length that may be wrong."""
    bits = draw(st.sampled_from([4, 8, 8, 4, 0, 255]))
    expected = LAYOUT.size if bits == 8 else (LAYOUT.size + 1) // 2
    length = draw(st.one_of(st.just(expected), st.integers(0, 4 * LAYOUT.size)))
    raw = draw(st.binary(min_size=length, max_size=length))
    frame = zstandard.ZstdCompressor(level=draw(st.sampled_from([-5, 1, 19]))).compress(raw)
    codes = draw(st.binary(min_size=len(BLOCKS), max_size=len(BLOCKS)))
    head = struct.pack("<QB", draw(st.integers(0, 2**64 - 1)), bits)
    return sealed(draw(st.sampled_from([3, 4])), head + codes + frame)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid message of any level, with some bytes of its payload changed, cut or added."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    level = draw(st.sampled_from(CODECS))
    valid = encode(
        generator.normal(size=LAYOUT.size), LAYOUT, level=level, seed=draw(st.integers(0, 2**64 - 1))
    )
    payload = bytearray(valid[HEADER_BYTES:])
    for _ in range(draw(st.integers(1, 4))):
        payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, 3))
    tail = draw(st.binary(max_size=3))
    return sealed(LEVELS[level].number, bytes(payload[: len(payload) - cut]) + tail)


KINDS = {
    "any bytes": st.binary(max_size=600),
    "any payload": st.builds(sealed, numbers, st.one_of(st.binary(max_size=400), fitting)),
    "any integers": compressed(),
    "damaged messages": damaged(),
}


def feed(kind: str, inputs: int) -> collections.Counter[str]:
    """Decode so many inputs of one kind; returns the number of shifts and of each error."""
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.target],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind])
    def check(data: bytes) -> None:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            vector = decode(data, LAYOUT)
        except CodecError as error:
            outcomes[type(error).__name__] += 1
        else:
            assert vector.shape == (LAYOUT.size,) and vector.dtype == np.float32, data
            assert np.isfinite(vector).all(), data
            outcomes["a shift"] += 1
        assert tracemalloc.get_traced_memory()[1] - before < MAX_MEMORY, data

    check()
    return outcomes


def main() -> None:
    """Feed all kinds and print the outcomes."""
    p = argument_parser(__doc__)
    p.add_argument("--inputs", type=int, default=200_000)
    options = parse_arguments(p)
    count, started = -(-options.inputs // len(KINDS)), time.monotonic()
    figures: dict[str, Any] = {}
    table = Table({"kind": "<20", "inputs": ">9,", "a shift": ">9,", "CodecError": ">11,"})
    tracemalloc.start()
    for kind in KINDS:
        outcomes = feed(kind, count)
        figures[kind] = {"inputs": outcomes.total(), **outcomes}
        table.row(kind, outcomes.total(), outcomes["a shift"], outcomes["CodecError"])
    total = sum(row["inputs"] for row in figures.values())
    print(f"{total:,} inputs in {time.monotonic() - started:.0f} s, without another outcome")
    write_json(options.json, figures)
    if not any("a shift" in row for row in figures.values()):
        raise SystemExit("no input gave a shift: the headers of this script do not match the codec's")


if __name__ == "__main__":
    main()
