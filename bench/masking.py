"""What masked sums cost: bytes, seconds and exactness, against sending each change openly.

    python -m bench.masking --out out/masking --json out/masking.json

First for CLIP ViT-B/16's 92,160 values by the number of sites: the bytes of one reply, seconds at a site to
make its masks and at the server to sum (medians of five), and the largest error of the weighted mean of
random changes against float64. Then the demonstration study on the starter backbone by the real ServerApp and
ClientApp in one process, unmasked at level exact and masked: accuracy, how far the final shifts lie apart,
and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Context, RecordDict

from fedsigma.client.app import app as client
from fedsigma.common.config.study import load_study
from fedsigma.common.privacy import secure_aggregation
from fedsigma.common.wire.records import MASKED_COUNTS, MaskedReply, to_record, wire_bytes
from fedsigma.server.app import app as server
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid

VALUES, SHOTS, BOUND = 92_160, 64, 16.0
WIDTHS = (10, 13, 10, 15, 10)


def seconds(call: Callable[[], object]) -> float:
    """The median of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cohort(
    sites: int,
) -> tuple[secure_aggregation.MaskContext, dict[str, X25519PrivateKey], dict[str, bytes]]:
    """So many sites with new keys: their place, private keys and identities."""
    names = [f"site-{number:04}" for number in range(sites)]
    keys = {name: X25519PrivateKey.generate() for name in names}
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    members = tuple(
        secure_aggregation.sign(identities[n], run=1, name=n, key=keys[n].public_key().public_bytes_raw())
        for n in names
    )
    public = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    return (
        secure_aggregation.MaskContext(
            run=1, round=1, attempt=0, members=members, bound=BOUND, most_examples=SHOTS
        ),
        keys,
        public,
    )


def measure(sites: int) -> dict[str, float]:
    """Bytes, seconds and error of one round with so many sites."""
    place, keys, public = cohort(sites)
    rng = np.random.default_rng(0)
    values = 0.05 * rng.normal(size=(sites, VALUES))
    weights = rng.integers(1, SHOTS + 1, sites)

    def one(number: int) -> np.ndarray:
        name = place.members[number].name
        secure_aggregation.check_members(
            place, public, me=name, key=keys[name].public_key().public_bytes_raw()
        )
        whole = secure_aggregation.to_integers(
            values[number], weight=weights[number], scale=place.scale, bound=BOUND
        )
        return secure_aggregation.mask(whole, place, me=name, private=keys[name])

    parts = [one(number) for number in range(sites)]
    mean = secure_aggregation.unmask_sum(parts) / place.scale / weights.sum()
    exact = weights @ values / weights.sum()
    reply = MaskedReply(masked=bytes(4 * (VALUES + len(MASKED_COUNTS))), steps=2)
    return {
        "bytes": wire_bytes(to_record(reply)),
        "site_seconds": seconds(lambda: one(0)),
        "server_seconds": seconds(lambda: secure_aggregation.unmask_sum(parts)),
        "largest_error": float(np.abs(mean - exact).max()),
        "relative_error": float(np.linalg.norm(mean - exact) / np.linalg.norm(exact)),
    }


def study(out: Path, rounds: int, masked: bool) -> dict[str, Any]:
    """Accuracy, shift and seconds of the demonstration study."""
    demo = load_study("demo")
    federation = replace(demo.federation, rounds=rounds, evaluate_every=rounds, masking=masked, codec="exact")
    out.mkdir(parents=True, exist_ok=True)
    folder, file = out / ("masked" if masked else "open"), out / "study.yaml"
    # In bfloat16 training's own roundings blow up a difference of 1e-6 until nothing can be compared.
    training = replace(demo.training, precision="float32")
    text = replace(demo, federation=federation, training=training, baselines=()).to_yaml()
    file.write_text(text, encoding="utf-8")
    if not (folder / "summary.json").exists():
        config: dict[str, Any] = {"study": str(file), "out": str(folder), "resume": False}
        server(FakeGrid(client, 4), Context(1, 1, {}, RecordDict(), config | {"seed": -1, "rounds": 0}))
    kept = RunDir.open(folder)
    summary = kept.read_summary()
    return {
        "accuracy": summary["federated"]["accuracy"],
        "bytes": summary["bytes_up_per_site_round"],
        "seconds": summary["seconds"],
        "shift": kept.load_shift().shift.numpy(),
    }


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--sites", type=int, nargs="+", default=[3, 10, 30, 100])
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    out = a.out.resolve()
    os.environ["FEDSIGMA_AUDIT"] = str(out / "audit")
    rows = {sites: measure(sites) for sites in a.sites}
    print(
        f"{'sites':>6}{'bytes':>10}{'s at a site':>13}{'s to sum':>10}{'largest error':>15}{'relative':>10}"
    )
    for sites, row in rows.items():
        print(
            f"{sites:6}{row['bytes']:10,}{row['site_seconds']:13.3f}{row['server_seconds']:10.4f}"
            f"{row['largest_error']:15.1e}{row['relative_error']:10.1e}"
        )
    plain, masked = study(out, a.rounds, False), study(out, a.rounds, True)
    apart = float(np.linalg.norm(masked.pop("shift") - (shift := plain.pop("shift"))) / np.linalg.norm(shift))
    for name, found in (("open", plain), ("masked", masked)):
        print(
            f"demo, {name}: accuracy {found['accuracy']:.4f}, {found['bytes']:,} bytes, {found['seconds']} s"
        )
    print(f"the final shifts lie {apart:.1e} of their length apart")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"sites": rows, "demo": {"open": plain, "masked": masked, "apart": apart}}
        a.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
