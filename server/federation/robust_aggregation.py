"""Aggregation rules that need every update of a round: Flower's own, called on arrays.

Flower keeps the arithmetic of these rules in functions beside its strategies. This module is the only one
that calls them; everything else works with plain arrays.

Each rule takes the global shift that the round began with, shape (values,), float64, and for each accepted
site its model (that shift plus its update), weight and training loss; it returns the next global shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.serverapp.strategy.qfedavg import compute_delta_and_h
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from numpy.typing import NDArray

__all__ = ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "qfedavg"]

Values = NDArray[np.float64]
Sites = Sequence[tuple[Values, float, float]]
_ARRAY, _WEIGHT = "shift", "weight"


def fedmedian(shift: Values, sites: Sites) -> Values:
    """Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498)."""
    return np.asarray(np.median(_stack(sites), axis=0))


def fedtrimmedavg(shift: Values, sites: Sites, *, beta: float = 0.2) -> Values:
    """Coordinate-wise mean without the share `beta` at either end (Yin et al. 2018, arXiv:1803.01498)."""
    return trim_mean(_stack(sites), beta)


def krum(shift: Values, sites: Sites, *, num_malicious_nodes: int = 0) -> Values:
    """The model that is nearest to its n - f - 2 neighbours (Blanchard et al. 2017, arXiv:1703.02757)."""
    return multikrum(shift, sites, num_malicious_nodes=num_malicious_nodes)


def multikrum(
    shift: Values, sites: Sites, *, num_malicious_nodes: int = 0, num_nodes_to_select: int = 1
) -> Values:
    """Weighted mean of the models that Krum ranks first (Blanchard et al. 2017, arXiv:1703.02757)."""
    contents = [
        RecordDict({"model": ArrayRecord({_ARRAY: Array(model)}), "metrics": MetricRecord({_WEIGHT: weight})})
        for model, weight, _ in sites
    ]
    selected = select_multikrum(
        contents, num_malicious_nodes=num_malicious_nodes, num_nodes_to_select=num_nodes_to_select
    )
    return aggregate_arrayrecords(selected, _WEIGHT)[_ARRAY].numpy()


def qfedavg(shift: Values, sites: Sites, *, client_learning_rate: float, q: float = 0.1) -> Values:
    """Fair averaging: sites with a larger loss count for more (Li et al. 2020, arXiv:1905.10497)."""
    total, normalizer = np.zeros_like(shift), 0.0
    for model, _, loss in sites:
        (delta,), h = compute_delta_and_h([shift], [model], q, 1.0 / client_learning_rate, loss)
        total += delta
        normalizer += h
    return shift - total / normalizer


def _stack(sites: Sites) -> Values:
    return np.stack([model for model, _, _ in sites])
