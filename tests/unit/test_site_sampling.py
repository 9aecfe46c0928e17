"""Sampling of sites: in proportion to their images, and the same in a resumed run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.server.federation.site_sampling import (
    cohort_size,
    inclusion_probabilities,
    reported_examples,
    sample_sites,
)

SIZES = st.lists(st.integers(1, 200), min_size=2, max_size=30)


def plan(share: float, *, least: int = 1, seed: int = 1) -> StudyConfig:
    study = StudyConfig.from_yaml("{name: s, backbone: b, classes: [a, b], federation: {strategy: fedadam}}")
    federation = replace(study.federation, participation=share, cohorts="by_images", min_sites=least)
    return replace(study, federation=federation, seed=seed)


def sites(sizes: list[int]) -> tuple[dict[int, str], dict[str, int]]:
    ready = {node: f"site-{node}" for node in range(len(sizes))}
    return ready, {name: sizes[node] for node, name in ready.items()}


@given(sizes=SIZES, data=st.data())
def test_inclusion_probabilities_are_proportional_and_at_most_one(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    probabilities = inclusion_probabilities(dict(enumerate(sizes)), count)
    assert sum(probabilities.values()) == pytest.approx(count)
    assert all(0 < one <= 1 for one in probabilities.values())
    if shares := [probabilities[node] / size for node, size in enumerate(sizes) if probabilities[node] < 1]:
        assert shares == pytest.approx([shares[0]] * len(shares))
        # A site that is always sampled would by its share be sampled more than always.
        assert all(size * shares[0] > 1 - 1e-9 for node, size in enumerate(sizes) if probabilities[node] == 1)


@given(sizes=SIZES, share=st.floats(0.01, 0.99), least=st.integers(1, 4), seed=st.integers(0, 20))
def test_sites_are_sampled_in_proportion_to_their_images(
    sizes: list[int], share: float, least: int, seed: int
) -> None:
    study, (ready, images) = plan(share, least=least, seed=seed), sites(sizes)
    count = min(len(sizes), max(least, math.ceil(share * len(sizes))))
    chance = inclusion_probabilities(dict(enumerate(sizes)), count)
    rounds, counts = 200, Counter[int]()
    for number in range(1, rounds + 1):
        sample = sample_sites(ready, study, round=number, images=images)
        assert len(sample.sites) == count and list(sample.sites) == sorted(sample.sites)
        for node in sample.sites:
            assert sizes[node] * sample.factors[node] == pytest.approx(sizes[node] / chance[node])
        counts.update(list(sample.sites))
    # Discrepancy of the golden section's multiples: below 1 + log2(200), and here much below.
    assert all(abs(counts[node] - rounds * one) < 5 for node, one in chance.items())


def test_a_site_without_a_reported_count_is_sampled_as_an_average_one() -> None:
    ready, images = sites([10, 10, 10, 10])
    del images["site-3"]
    counts, unreported = Counter[int](), Counter[int]()
    for number in range(1, 101):
        counts.update(list(sample_sites(ready, plan(0.25), round=number, images=images).sites))
        unreported.update(list(sample_sites(ready, plan(0.25), round=number).sites))
    assert all(abs(counts[node] - 25) <= 2 and abs(unreported[node] - 25) <= 2 for node in ready)


def test_the_sample_depends_on_the_seed_alone() -> None:
    ready, images = sites([5, 9, 2, 7, 30, 4])

    def all_of(seed: int) -> list[list[int]]:
        study = plan(0.3, seed=seed)
        return [list(sample_sites(ready, study, round=r, images=images).sites) for r in range(1, 20)]

    assert all_of(1) == all_of(1) != all_of(2)


def test_reported_examples_are_read_from_the_rounds_done() -> None:
    study = plan(0.5)
    rows = [
        {"round": 1, "site": "a", "status": "accepted", "examples": 9},
        {"round": 1, "site": "b", "status": "rejected", "examples": 400},
        {"round": 1, "site": ALL_SITES, "status": ALL_SITES, "examples": 9},
        {"round": 2, "site": "c", "status": "accepted", "examples": 50.0},
        {"round": 3, "site": "d", "status": "accepted", "examples": 5},
        {"round": 2, "site": "e", "status": "accepted", "examples": None},
    ]
    assert reported_examples(rows, study, done=2) == {"a": 9, "c": 50}
    capped = replace(study, federation=replace(study.federation, max_examples=20))
    assert reported_examples(rows, capped, done=2) == {"a": 9, "c": 20}


@pytest.mark.parametrize(
    "lines",
    [
        "federation: {cohorts: by_images}",
        "federation: {cohorts: by_images, participation: 0.5, masking: true}",
        "federation: {cohorts: by_images, participation: 0.5}, "
        "privacy: {level: site, noise_multiplier: 1, clip_norm: 1}",
        "federation: {cohorts: by_image, participation: 0.5}",
        "federation: {cohorts: by_images, participation: 0.5, strategy: fedmedian}",
    ],
)
def test_settings_that_exclude_sampling_by_images_are_refused(lines: str) -> None:
    with pytest.raises(ConfigError, match=r"federation\.cohorts"):
        StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], {lines}}}")


def test_a_share_is_not_rounded_up_by_binary_fractions() -> None:
    study = StudyConfig.from_yaml("{name: s, backbone: b, classes: [a, b], federation: {min_sites: 1}}")
    for percent in range(1, 101):
        share = replace(study, federation=replace(study.federation, participation=percent / 100))
        for sites in range(1, 201):
            assert cohort_size(share, sites) == -(-percent * sites // 100), (percent, sites)
