"""Which sites are asked: as often as their images say, and the same again when a run is gone on with."""

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
def test_chances_are_in_proportion_and_none_is_above_one(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    found = inclusion_probabilities(dict(enumerate(sizes)), count)
    assert sum(found.values()) == pytest.approx(count)
    assert all(0 < one <= 1 for one in found.values())
    if shares := [found[node] / size for node, size in enumerate(sizes) if found[node] < 1]:
        assert shares == pytest.approx([shares[0]] * len(shares))
        # Whoever is always asked would by its share be asked more than always.
        assert all(size * shares[0] > 1 - 1e-9 for node, size in enumerate(sizes) if found[node] == 1)


@given(sizes=SIZES, share=st.floats(0.01, 0.99), least=st.integers(1, 4), seed=st.integers(0, 20))
def test_as_many_as_the_share_are_asked_and_each_as_often_as_its_images_say(
    sizes: list[int], share: float, least: int, seed: int
) -> None:
    study, (ready, images) = plan(share, least=least, seed=seed), sites(sizes)
    count = min(len(sizes), max(least, math.ceil(share * len(sizes))))
    chance = inclusion_probabilities(dict(enumerate(sizes)), count)
    rounds, asked = 200, Counter[int]()
    for number in range(1, rounds + 1):
        drawn = sample_sites(ready, study, round=number, images=images)
        assert len(drawn.sites) == count and list(drawn.sites) == sorted(drawn.sites)
        for node in drawn.sites:
            assert sizes[node] * drawn.factors[node] == pytest.approx(sizes[node] / chance[node])
        asked.update(list(drawn.sites))
    # Discrepancy of the golden section's multiples: below 1 + log2(200), and here much below.
    assert all(abs(asked[node] - rounds * one) < 5 for node, one in chance.items())


def test_a_site_that_has_not_told_counts_as_a_typical_one_and_nobody_told_is_all_alike() -> None:
    ready, images = sites([10, 10, 10, 10])
    del images["site-3"]
    asked, nobody = Counter[int](), Counter[int]()
    for number in range(1, 101):
        asked.update(list(sample_sites(ready, plan(0.25), round=number, images=images).sites))
        nobody.update(list(sample_sites(ready, plan(0.25), round=number).sites))
    assert all(abs(asked[node] - 25) <= 2 and abs(nobody[node] - 25) <= 2 for node in ready)


def test_the_draw_is_the_same_again_and_another_with_another_seed() -> None:
    ready, images = sites([5, 9, 2, 7, 30, 4])

    def all_of(seed: int) -> list[list[int]]:
        study = plan(0.3, seed=seed)
        return [list(sample_sites(ready, study, round=r, images=images).sites) for r in range(1, 20)]

    assert all_of(1) == all_of(1) != all_of(2)


def test_what_sites_have_told_is_read_from_the_rounds_that_are_done() -> None:
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
def test_what_cannot_be_drawn_by_images_is_refused(lines: str) -> None:
    with pytest.raises(ConfigError, match=r"federation\.cohorts"):
        StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], {lines}}}")


def test_a_share_is_not_rounded_up_by_what_binary_numbers_lack() -> None:
    study = StudyConfig.from_yaml("{name: s, backbone: b, classes: [a, b], federation: {min_sites: 1}}")
    for percent in range(1, 101):
        share = replace(study, federation=replace(study.federation, participation=percent / 100))
        for sites in range(1, 201):
            assert cohort_size(share, sites) == -(-percent * sites // 100), (percent, sites)
