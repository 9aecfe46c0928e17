"""How far each site goes in a round, and whether it goes the way of the others.

With w the model that the round began with, s_i the shift of site i and n_i its weight in the mean (its
examples, at most federation.max_examples), its change is d_i = s_i - w, the mean change of the accepted sites
is m = sum_i n_i d_i / sum_i n_i, and

    change_norm_i = ||d_i||,    change_cosine_i = d_i . m / (||d_i|| ||m||),    shift_norm_i = ||s_i||.

A site whose cosine is much below the others', or negative, has images that ask for another model. Its own
change is part of the mean, so a site that is alone has a cosine of 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsigma.server.replies import Accepted

__all__ = ["drift"]


def drift(accepted: Sequence[Accepted], start: NDArray[np.float32]) -> list[dict[str, float]]:
    """The drift of each accepted reply of a round, by the names of its columns in rounds.csv.

    A change, or a mean of them, that is zero has no direction: `change_cosine` is then absent.

    Shapes: start, the model that the round began with, (layout size,).
    """
    if not accepted:
        return []
    changes = [one.shift - start.astype(np.float64) for one in accepted]
    mean = np.average(changes, axis=0, weights=[one.weight for one in accepted])
    return [_one(change, mean, one.shift) for change, one in zip(changes, accepted, strict=True)]


def _one(
    change: NDArray[np.float64], mean: NDArray[np.float64], shift: NDArray[np.float64]
) -> dict[str, float]:
    length = float(np.linalg.norm(change))
    found = {"change_norm": length, "shift_norm": float(np.linalg.norm(shift))}
    if lengths := length * float(np.linalg.norm(mean)):
        # Rounding may take it a little past 1.
        found["change_cosine"] = float(np.clip(change @ mean / lengths, -1.0, 1.0))
    return found
