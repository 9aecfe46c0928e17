"""Masks cancel in the sum of a cohort, hide each part of it, and come only from keys of known sites."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.privacy import secure_aggregation
from fedsigma.common.privacy.secure_aggregation import (
    MaskContext,
    MaskingError,
    check_members,
    mask,
    scale_for,
    to_integers,
    unmask_sum,
)

NAMES = ("east", "north", "south", "west")
IDENTITIES = {name: Ed25519PrivateKey.generate() for name in NAMES}
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in IDENTITIES.items()}
KEYS = {name: X25519PrivateKey.generate() for name in NAMES}


def own(name: str) -> bytes:
    return KEYS[name].public_key().public_bytes_raw()


def place(*names: str, run: int = 7, round: int = 1, attempt: int = 0) -> MaskContext:
    members = tuple(
        secure_aggregation.sign(IDENTITIES[n], run=run, name=n, key=own(n)) for n in names or NAMES
    )
    return MaskContext(run=run, round=round, attempt=attempt, members=members, bound=16.0, most_examples=64)


def masked(integers: np.ndarray, where: MaskContext, name: str) -> np.ndarray:
    return mask(integers, where, me=name, private=KEYS[name])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_the_sum_is_the_weighted_sum_to_the_last_step(sites: int, size: int, seed: int, bound: float) -> None:
    rng, where = np.random.default_rng(seed), place(*NAMES[:sites])
    values = rng.uniform(-bound, bound, (sites, size))
    weights = rng.integers(1, 65, sites)
    scale = scale_for(bound=bound, weights=64 * sites)
    parts = [
        masked(to_integers(x, weight=w, scale=scale, bound=bound), where, name)
        for x, w, name in zip(values, weights, NAMES, strict=False)
    ]
    found = unmask_sum(parts) / scale
    np.testing.assert_allclose(found, weights @ values, rtol=0, atol=0.5 * sites / scale)


@given(st.floats(1e-3, 1e4), st.integers(1, 1000), st.integers(1, 10_000))
def test_the_largest_values_of_all_sites_do_not_overflow(bound: float, sites: int, weight: int) -> None:
    if bound * sites * weight > 2**30:
        with pytest.raises(MaskingError, match="do not fit 32 bits"):
            scale_for(bound=bound, weights=sites * weight)
        return
    scale = scale_for(bound=bound, weights=sites * weight)
    one = to_integers(np.array([bound, -bound]), weight=weight, scale=scale, bound=bound).view(np.int32)
    assert (np.abs(one.astype(np.int64) * sites) < 2**31).all()
    assert abs(one[0] / scale - weight * bound) <= 0.5 / scale


@pytest.mark.parametrize("value", [1.0001, -1.0001, np.nan, np.inf])
def test_a_value_without_room_is_refused(value: float) -> None:
    with pytest.raises(MaskingError, match="above 1, for which the masked sum has no room"):
        to_integers(np.array([0.0, value]), weight=3, scale=8, bound=1)


def test_masked_update_looks_random_and_depends_on_its_context() -> None:
    zeros = np.zeros(20_000, np.uint32)
    first = masked(zeros, place(), "east")
    shares = np.bincount(first.view(np.uint8), minlength=256) / first.nbytes
    assert np.abs(shares - 1 / 256).max() < 6 * np.sqrt(1 / 256 / first.nbytes)
    others = [
        masked(zeros, where, "east")
        for where in (place(run=8), place(round=2), place(attempt=1), place("east", "north", "south"))
    ]
    for other in others:
        assert np.count_nonzero(first == other) < 5
        assert np.count_nonzero(first - other == (first - other)[0]) < 5


def test_a_mask_is_bound_to_its_whole_cohort() -> None:
    """Else the streams of a pair would be those of any cohort that both are in."""
    smaller = place("east", "north", "south")
    assert smaller.info != place().info and place().info == place().info
    other_key = swap(place(), 3, key=SERVERS)
    assert other_key.info != place().info


def test_one_update_at_two_scales_is_never_under_one_mask() -> None:
    """Else the difference of the two would be the change, times the difference of the scales."""
    for other in (replace(place(), bound=8.0), replace(place(), most_examples=32)):
        zeros = np.zeros(1000, np.uint32)
        assert np.count_nonzero(masked(zeros, place(), "east") == masked(zeros, other, "east")) < 5


def test_all_but_one_of_the_others_together_cannot_unmask() -> None:
    """East is hidden as long as one other site keeps its key."""
    where, secret = place(), np.arange(5000, dtype=np.uint32)
    sent = masked(secret, where, "east")
    for name in ("north", "south"):  # what these two can compute of east's masks
        sent = sent - secure_aggregation._stream(KEYS[name], own("east"), where.info, secret.size)
    assert np.count_nonzero(sent == secret) < 5
    np.testing.assert_array_equal(
        sent - secure_aggregation._stream(KEYS["west"], own("east"), where.info, 5000), secret
    )


def test_a_sum_without_one_site_is_noise() -> None:
    parts = [masked(np.ones(5000, np.uint32), place(), name) for name in NAMES[:3]]
    assert np.count_nonzero(np.abs(unmask_sum(parts)) < 1000) < 5


def test_a_cohort_of_known_sites_is_accepted() -> None:
    check_members(place(), PUBLIC, me="east", key=own("east"))


def swap(where: MaskContext, number: int, **changes: object) -> MaskContext:
    members = list(where.members)
    members[number] = replace(members[number], **changes)
    return replace(where, members=tuple(members))


SERVERS = X25519PrivateKey.generate().public_key().public_bytes_raw()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (swap(place(), 1, key=SERVERS), "'north' is not signed by that site"),
        (swap(place(), 1, signature=b"\0" * 64), "'north' is not signed"),
        (swap(place(), 1, key=own("south"), signature=place().members[2].signature), "'north' is not signed"),
        (replace(place(run=6), run=7), "is not signed by that site"),
        (swap(place(), 3, name="wild"), "'wild' is not among the sites"),
        (replace(place(), members=place().members[::-1]), "twice or out of order"),
        (replace(place(), members=(*place().members, place().members[3])), "twice or out of order"),
        (place("north", "south"), "not in the cohort with the key that it sent"),
        (swap(place(), 0, key=SERVERS), "not in the cohort with the key that it sent"),
    ],
)
def test_man_in_the_middle_is_detected(where: MaskContext, words: str) -> None:
    with pytest.raises(MaskingError, match=words):
        check_members(where, PUBLIC, me="east", key=own("east"))


def test_a_key_of_small_order_is_refused() -> None:
    where = swap(place(), 1, key=b"\0" * 32)
    with pytest.raises(MaskingError, match="not an X25519 key"):
        masked(np.zeros(2, np.uint32), where, "east")


def test_nothing_has_no_sum() -> None:
    with pytest.raises(MaskingError, match="no masked reply"):
        unmask_sum([])
