"""The sites of a round: all, a share drawn anew, or a share drawn in proportion to their images.

In proportion to images, with n_i images at site i and m sites a round, a site is asked with the chance
p_i = min(1, m n_i / sum n) and its change counts n_i / p_i (Horvitz and Thompson 1952): alike, unless a site
is so large that it is always asked. So the expected sum of the changes is that of all sites' images, and no
round is spent on a site whose change would hardly count. The draw is systematic (Madow 1949): the chances
lie end to end on a line, and a site is asked if a point at distance u + k, k a whole number, falls on its
part. u moves on by the golden section from round to round, which spreads a site's rounds evenly.
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

    Fields: sites, node id -> name; factors, node id -> what its weight in the mean is multiplied by.
    """

    sites: dict[int, str]
    factors: dict[int, float]


def sample_sites(
    ready: Mapping[int, str], study: StudyConfig, *, round: int, images: Mapping[str, int] | None = None
) -> Cohort:
    """The sites of a round: the study's share of those that are ready, and at least its min_sites.

    The draw depends on the study's seed, the round, the sites' names and `images`, so a resumed run draws the
    same.

    Args:
        ready: node id -> name.
        study: `federation.participation` is the share, 1 takes all; `federation.cohorts` how it is drawn.
        round: its number, from 1.
        images: name -> training images, of the sites that have told them; others count as a typical one.

    Returns:
        The sites drawn, in the order of `ready`.
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
    """How many of so many sites are asked in a round."""
    federation = study.federation
    share = round(federation.participation * sites, 9)  # 0.07 of 100 sites are 7.000000000000001 in binary
    return min(sites, max(federation.min_sites, math.ceil(share)))


def total_steps(study: StudyConfig, sites: int) -> int:
    """The steps that so many sites make together in the whole study, if each answers whenever it is asked."""
    return study.federation.rounds * study.training.local_steps * cohort_size(study, sites)


def _in_proportion(
    ready: Mapping[int, str], study: StudyConfig, round: int, images: Mapping[str, int], count: int
) -> Cohort:
    typical = mean([images[name] for name in ready.values() if name in images] or [1])
    chance = inclusion_probabilities({node: images.get(name, typical) for node, name in ready.items()}, count)
    chosen = {node for node, one in chance.items() if one == 1}
    others = sorted(
        chance.keys() - chosen,
        key=lambda node: (derive_seed(study.seed, ready[node], "order", 0), ready[node]),
    )
    begin = random.Random(derive_seed(study.seed, "all sites", "cohort", 0)).random()
    first, end = (begin + round * GOLDEN) % 1.0, 0.0
    points = count - len(chosen)
    for place, node in enumerate(others, start=1):
        # The last part ends where the line does, whatever the sum was rounded to.
        start, end = end, end + chance[node] if place < len(others) else float(points)
        if math.ceil(end - first) > math.ceil(start - first):
            chosen.add(node)
    sites = {node: name for node, name in ready.items() if node in chosen}
    return Cohort(sites, {node: 1 / chance[node] for node in sites})


def inclusion_probabilities(images: Mapping[int, float], count: int) -> dict[int, float]:
    """How likely each site is to be among `count` that are drawn in proportion to their images.

    Args:
        images: node id -> a number above zero.
        count: from 1 to the number of sites.

    Returns:
        Node id -> above 0 and at most 1; they sum to `count`.
    """
    rest, found = dict(images), dict[int, float]()
    while rest:
        left, total = count - len(found), sum(rest.values())
        certain = [node for node, size in rest.items() if left * size >= total]
        if not certain:
            return found | {node: left * size / total for node, size in rest.items()}
        for node in certain:
            found[node] = 1.0
            del rest[node]
    return found


def reported_examples(rows: Iterable[Mapping[str, Any]], study: StudyConfig, *, done: int) -> dict[str, int]:
    """The training images that sites have told by the end of round `done`, as far as they count; by name."""
    return {
        row["site"]: aggregation_weight(int(row["examples"]), study)
        for row in rows
        if row["status"] == "accepted" and row["round"] <= done and row.get("examples")
    }
