"""What coding took from a site's changes, kept at the site and sent with the next one."""

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

    Coding a change coarsely loses some of it. What is lost is added to the site's next change, so that over
    the rounds only the last loss is missing from what the server was told. It lies in the state that Flower
    keeps for a site during a run; a site that starts anew begins without it, and misses one loss.

    Args:
        state: of the site in this run.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def residual(self, layout: Layout, *, before: int) -> Vector:
        """What coding lost in the last round that this site took part in (layout size,).

        Zeros if there is none. A round that is asked for again gets zeros, too: its first reply did not
        count, so what that lost is not missing.
        """
        kept = self._state.config_records.get(_RECORD)
        if kept is None or kept["layout"] != layout.digest or int(str(kept["round"])) >= before:
            return np.zeros(layout.size, np.float32)
        return np.frombuffer(cast(bytes, kept["lost"]), "<f4").astype(np.float32)

    def store(self, residual: Vector, layout: Layout, *, round: int) -> None:
        """Keep what coding lost in a round."""
        if not residual.any():
            self._state.pop(_RECORD, None)
            return
        self._state[_RECORD] = ConfigRecord(
            {"layout": layout.digest, "round": round, "lost": residual.astype("<f4").tobytes()}
        )
