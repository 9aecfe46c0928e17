"""Error feedback: the residual of coding, which a site adds to its next update."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["ErrorFeedback"]

Vector = NDArray[np.float32]
_RECORD = "fedsigma.feedback"


class ErrorFeedback:
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) between rounds.

    Coarse coding of an update leaves a residual. The site adds it to its next update, so that over all
    rounds the server misses the last residual only. It is stored in Flower's state of the run; a site that
    restarts loses it.

    Args:
        state: Flower's state of the site in this run.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def residual(self, layout: Layout, *, before: int) -> Vector:
        """Return the residual of the last round before this one, float32 of shape (layout.size,).

        It is zero if none is stored for this layout, and in a retried round, whose first reply was not
        aggregated.
        """
        record = self._state.config_records.get(_RECORD)
        if record is None or record["layout"] != layout.digest or int(str(record["round"])) >= before:
            return np.zeros(layout.size, np.float32)
        return np.frombuffer(cast(bytes, record["residual"]), "<f4").astype(np.float32)

    def store(self, residual: Vector, layout: Layout, *, round: int) -> None:
        """Store the residual of a round."""
        if not residual.any():
            self._state.pop(_RECORD, None)
            return
        self._state[_RECORD] = ConfigRecord(
            {"layout": layout.digest, "round": round, "residual": residual.astype("<f4").tobytes()}
        )
