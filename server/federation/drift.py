"""How far each site goes in a round, and whether it goes the way of the others.

With w the model that the round began with, s_i the shift of site i and n_i its weight in the mean (its
examples, at most federation.max_examples, over its chance of being asked), its change is d_i = s_i - w, the
mean change of the accepted sites is m = sum_i n_i d_i / sum_i n_i, and

    change_norm_i = ||d_i||,    change_cosine_i = d_i . m / (||d_i|| ||m||),    shift_norm_i = ||s_i||.

A site whose cosine is much below the others', or negative, has images that ask for another model. Its own
change is part of the mean, so a site that is alone has a cosine of 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsigma.server.federation.validation import Accepted, inner, length_of

__all__ = ["drift", "mean_change"]

Vector = NDArray[np.float32]


def mean_change(accepted: Mapping[int, Accepted], changes: Mapping[int, Vector]) -> NDArray[np.float64]:
    """The weighted mean of the changes of the accepted replies (layout size,), at least one.

    Added up in float64 and in the order of `accepted`, so that its last bit does not depend on who was first.
    One change is in memory at a time.
    """
    total: NDArray[np.float64] | None = None
    for node, one in accepted.items():
        change = changes[node]
        if total is None:
            total, part = np.zeros((2, change.size))
        total += np.multiply(change, one.weight, out=part, dtype=np.float64)
    assert total is not None
    return total / sum(one.weight for one in accepted.values())


def drift(
    accepted: Mapping[int, Accepted], changes: Mapping[int, Vector], mean: NDArray[np.float64]
) -> dict[int, dict[str, float]]:
    """The drift of each accepted reply of a round, by the names of its columns in rounds.csv.

    A change, or a mean of them, that is zero has no direction: `change_cosine` is then absent.

    Shapes: mean, that of `mean_change`, (layout size,).
    """
    length = length_of(mean)
    found = {}
    for node, one in accepted.items():
        found[node] = {"change_norm": one.change_norm, "shift_norm": one.shift_norm}
        if lengths := one.change_norm * length:
            cosine = inner(changes[node], mean) / lengths
            # Rounding may take it a little past 1.
            found[node]["change_cosine"] = float(np.clip(cosine, -1.0, 1.0))
    return found
