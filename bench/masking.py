"""The cost of secure aggregation: bytes, seconds and exactness, against sending each update openly.

    python -m bench.masking --out out/masking --json out/masking.json

First for CLIP ViT-B/16's 92,160 values by the number of sites: the bytes of one reply, seconds at a site to
mask its update and at the server to sum (medians of five), and the error of the weighted mean of random
updates against float64. Then the demonstration study on the starter backbone by the real ServerApp and
ClientApp in one process, open at level exact and masked: accuracy, the distance of the final shifts, and
seconds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from bench.harness import REQUIRED, Table, argument_parser, median_seconds, parse_arguments, write_json
from bench.runs import run_in_process
from fedsigma.client.app import app as client
from fedsigma.common.config.study import load_study
from fedsigma.common.privacy.secure_aggregation import (
    MaskContext,
    check_members,
    mask,
    sign,
    to_integers,
    unmask_sum,
)
from fedsigma.common.wire.records import MASKED_COUNTS, MaskedReply, to_record, wire_bytes
from fedsigma.server.simulation.in_process import InProcessGrid

VALUES, SHOTS, BOUND = 92_160, 64, 16.0


def cohort(sites: int) -> tuple[MaskContext, dict[str, X25519PrivateKey], dict[str, bytes]]:
    """Return a cohort with new keys: its context, and the sites' private keys and identities."""
    names = [f"site-{number:04}" for number in range(sites)]
    keys = {name: X25519PrivateKey.generate() for name in names}
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    members = tuple(
        sign(identities[n], run=1, name=n, key=keys[n].public_key().public_bytes_raw()) for n in names
    )
    context = MaskContext(run=1, round=1, attempt=0, members=members, bound=BOUND, most_examples=SHOTS)
    return context, keys, {name: key.public_key().public_bytes_raw() for name, key in identities.items()}


def measure(sites: int) -> dict[str, float]:
    """Return bytes, seconds and errors of one round with so many sites."""
    context, keys, identities = cohort(sites)
    rng = np.random.default_rng(0)
    updates = 0.05 * rng.normal(size=(sites, VALUES))
    weights = rng.integers(1, SHOTS + 1, sites)

    def masked_update(number: int) -> np.ndarray:
        name = context.members[number].name
        check_members(context, identities, me=name, key=keys[name].public_key().public_bytes_raw())
        integers = to_integers(updates[number], weight=weights[number], scale=context.scale, bound=BOUND)
        return mask(integers, context, me=name, private=keys[name])

    parts = [masked_update(number) for number in range(sites)]
    mean = unmask_sum(parts) / context.scale / weights.sum()
    exact = weights @ updates / weights.sum()
    reply = MaskedReply(masked=bytes(4 * (VALUES + len(MASKED_COUNTS))), steps=2)
    return {
        "bytes": wire_bytes(to_record(reply)),
        "site_seconds": median_seconds(lambda: masked_update(0)),
        "server_seconds": median_seconds(lambda: unmask_sum(parts)),
        "largest_error": float(np.abs(mean - exact).max()),
        "relative_error": float(np.linalg.norm(mean - exact) / np.linalg.norm(exact)),
    }


def run_demo(out: Path, rounds: int, *, masked: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Return accuracy, bytes and seconds of the demonstration study, and its shift."""
    demo = load_study("demo")
    federation = replace(demo.federation, rounds=rounds, evaluate_every=rounds, masking=masked, codec="exact")
    # In bfloat16, rounding in training amplifies a difference of 1e-6 beyond comparison.
    training = replace(demo.training, precision="float32")
    study = replace(demo, federation=federation, training=training, baselines=())
    run = run_in_process(study, out / ("masked" if masked else "open"), InProcessGrid(client, 4))
    summary = run.read_summary()
    figures = {
        "accuracy": summary["federated"]["accuracy"],
        "bytes": summary["bytes_up_per_site_round"],
        "seconds": summary["seconds"],
    }
    return figures, run.load_shift().shift.numpy()


def main() -> None:
    """Measure and print."""
    p = argument_parser(__doc__, out=REQUIRED, rounds=6)
    p.add_argument("--sites", type=int, nargs="+", default=[3, 10, 30, 100])
    options = parse_arguments(p)
    columns = {"sites": ">6", "bytes": ">9,", "s at a site": ">12.3f", "s to sum": ">9.4f"}
    table = Table(columns | {"largest error": ">14.1e", "relative": ">9.1e"})
    rows = {}
    for sites in options.sites:
        rows[sites] = measure(sites)
        table.row(sites, *rows[sites].values())
    (plain, plain_shift), (masked, masked_shift) = (
        run_demo(options.out, options.rounds, masked=masked) for masked in (False, True)
    )
    distance = float(np.linalg.norm(masked_shift - plain_shift) / np.linalg.norm(plain_shift))
    for name, row in (("open", plain), ("masked", masked)):
        print(f"demo, {name}: accuracy {row['accuracy']:.4f}, {row['bytes']:,} bytes, {row['seconds']} s")
    print(f"relative distance of the final shifts: {distance:.1e}")
    demo = {"open": plain, "masked": masked, "distance": distance}
    write_json(options.json, {"sites": rows, "demo": demo})


if __name__ == "__main__":
    main()
