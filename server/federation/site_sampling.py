"""The sites of a round: all, a random share, or a share sampled in proportion to their images.

In proportion to images, with n_i images at site i and m sites a round, a site is sampled with probability
p_i = min(1, m n_i / sum n) and its update has weight n_i / p_i (Horvitz and Thompson 1952): the same for all,
unless a site is so large that it is always sampled. The expected sum of the updates is then that of all
sites' images, and no round is spent on a site whose update would hardly count. The sampling is systematic
(Madow 1949): the probabilities are laid end to end on a line, and a site is sampled if a point at distance u
+ k, k a whole number, is in its part. u moves by the golden section from round to round, which spreads a
site's rounds evenly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.trainer import derive_seed
from fedsigma.server.federation.validation import aggregation_weight

__all__ = [
    "Cohort",
    "cohort_size",
    "inclusion_probabilities",
    "reported_examples",
    "sample_sites",
    "total_steps",
]

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Cohort:
    """The sites of a round.

    Attributes:
        sites: Name by node.
        factors: What a site's weight in the mean is multiplied by, by node.
    """

    sites: dict[int, str]
    factors: dict[int, float]


def sample_sites(
    ready: Mapping[int, str], study: StudyConfig, *, round: int, images: Mapping[str, int] | None = None
) -> Cohort:
    """Sample the sites of a round: the study's share of those that are ready, and at least its min_sites.

    The sample depends on the study's seed, the round, the sites' names and `images` alone, so a resumed run
    gets the same.

    Args:
        ready: Name of each ready site by node.
        study: `federation.participation` is the share (1: all), `federation.cohorts` how it is sampled.
        round: Number of the round, from 1.
        images: Training images by site name, as far as sites reported them; others count as an average one.

    Returns:
        The sampled sites, in the order of `ready`.
    """
    count = cohort_size(study, len(ready))
    if count == len(ready):
        return Cohort(dict(ready), dict.fromkeys(ready, 1.0))
    if study.federation.cohorts == "by_images":
        return _in_proportion(ready, study, round, images or {}, count)
    ranks = {node: derive_seed(study.seed, name, "cohort", round) for node, name in ready.items()}
    chosen = set(sorted(ready, key=lambda node: (ranks[node], ready[node]))[:count])
    return Cohort({n: name for n, name in ready.items() if n in chosen}, dict.fromkeys(chosen, 1.0))


def cohort_size(study: StudyConfig, sites: int) -> int:
    """How many of `sites` sites are sampled in a round."""
    # 0.07 of 100 sites are 7.000000000000001 in binary.
    share = math.ceil(round(study.federation.participation * sites, 9))
    return min(sites, max(study.federation.min_sites, share))


def total_steps(study: StudyConfig, sites: int) -> int:
    """The training steps of `sites` sites together over the study, if every site replies."""
    return study.federation.rounds * study.training.local_steps * cohort_size(study, sites)


def _in_proportion(
    ready: Mapping[int, str], study: StudyConfig, round: int, images: Mapping[str, int], count: int
) -> Cohort:
    typical = mean([images[name] for name in ready.values() if name in images] or [1])
    sizes = {node: images.get(name, typical) for node, name in ready.items()}
    probabilities = inclusion_probabilities(sizes, count)
    chosen = {node for node, probability in probabilities.items() if probability == 1}
    others = sorted(
        probabilities.keys() - chosen,
        key=lambda node: (derive_seed(study.seed, ready[node], "order", 0), ready[node]),
    )
    begin = random.Random(derive_seed(study.seed, "all sites", "cohort", 0)).random()
    first, end = (begin + round * GOLDEN) % 1.0, 0.0
    points = count - len(chosen)
    for number, node in enumerate(others, start=1):
        # The last part ends where the line does, whatever the sum was rounded to.
        start, end = end, end + probabilities[node] if number < len(others) else float(points)
        if math.ceil(end - first) > math.ceil(start - first):
            chosen.add(node)
    return Cohort({n: ready[n] for n in ready if n in chosen}, {n: 1 / probabilities[n] for n in chosen})


def inclusion_probabilities(images: Mapping[int, float], count: int) -> dict[int, float]:
    """The probability of each site to be among `count` that are sampled in proportion to their images.

    Args:
        images: A number above zero by node.
        count: From 1 to the number of sites.

    Returns:
        Probabilities by node, above 0 and at most 1; they sum to `count`.
    """
    rest, probabilities = dict(images), dict[int, float]()
    while rest:
        left, total = count - len(probabilities), sum(rest.values())
        certain = [node for node, size in rest.items() if left * size >= total]
        if not certain:
            return probabilities | {node: left * size / total for node, size in rest.items()}
        for node in certain:
            probabilities[node] = 1.0
            del rest[node]
    return probabilities


def reported_examples(rows: Iterable[Mapping[str, Any]], study: StudyConfig, *, done: int) -> dict[str, int]:
    """Training images by site as reported up to round `done`, limited to federation.max_examples."""
    return {
        row["site"]: aggregation_weight(int(row["examples"]), study)
        for row in rows
        if row["status"] == "accepted" and row["round"] <= done and row.get("examples")
    }
