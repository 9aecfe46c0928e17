"""Goes on with runs whose process died: killed, out of memory, or lost with the machine.

A run that ended by itself, well or not, wrote so into its folder; one that was stopped was meant to end. What
is left are runs that Flower calls failed while their folder says that they were going on.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC
from pathlib import Path

from fedsigma.common.utils.hash_chain import LogTampered
from fedsigma.server.deployment.database import Submission
from fedsigma.server.deployment.flower_control import ControlError
from fedsigma.server.deployment.home import ServerHome, ServerHomeError
from fedsigma.server.deployment.studies import Studies, SubmissionStatus
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["MAX_ATTEMPTS", "resume_crashed_runs", "watch"]

PERIOD_S = 10.0
MAX_ATTEMPTS = 3
"""How often a run is gone on with that does not finish one round more."""

log = logging.getLogger(__name__)


def watch(folder: ServerHome) -> None:
    """Look every few seconds, for ever."""
    studies = Studies(folder)
    while True:
        try:
            resume_crashed_runs(studies)
        except (ControlError, ServerHomeError, LogTampered, OSError, ValueError) as error:
            # The SuperLink may be down; another look finds the same runs.
            log.warning("%s", error)
        time.sleep(PERIOD_S)


def resume_crashed_runs(studies: Studies) -> list[Submission]:
    """Go on with each run whose process died; returns the new submissions.

    Raises:
        ControlError: the SuperLink does not answer.
    """
    if not studies.may_have_crashed_runs():
        return []
    submitted = studies.statuses()
    resumed = {one.submission.resumes for one in submitted}
    found = []
    for one in submitted:
        made = one.submission
        if made.run_id in resumed or not one.crashed:
            continue
        tries = _tries(made, submitted)
        if tries >= MAX_ATTEMPTS:
            log.warning("run %s died %d times without a further round: left as it is", made.run_id, tries)
            continue
        found.append(studies.resume(made.run_id))
        log.warning("run %s died: run %s goes on with it", made.run_id, found[-1].run_id)
    return found


def _tries(made: Submission, submitted: list[SubmissionStatus]) -> int:
    """How many runs of this folder began since its last finished round."""
    events = RunDir(Path(made.folder)).events()
    last = max((e["time"] for e in events if e["kind"] == "round_end"), default=0.0)
    same = [one.submission for one in submitted if one.submission.folder == made.folder]
    return sum(one.submitted_at.replace(tzinfo=UTC).timestamp() >= int(last) for one in same)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    watch(ServerHome(Path(sys.argv[1])))
