"""Resume runs whose process died: killed, out of memory, or lost with the machine.

A run that completed or failed has recorded this in its folder, and a run that was stopped was meant to end.
What remains are runs that Flower reports as failed while their folder says that they were running.
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
"""How often a run is resumed that does not finish a further round."""

log = logging.getLogger(__name__)


def watch(home: ServerHome) -> None:
    """Resume crashed runs every `PERIOD_S` seconds; does not return."""
    studies = Studies(home)
    while True:
        try:
            resume_crashed_runs(studies)
        except (ControlError, ServerHomeError, LogTampered, OSError, ValueError) as error:
            # The SuperLink may be down; the next try finds the same runs.
            log.warning("%s", error)
        time.sleep(PERIOD_S)


def resume_crashed_runs(studies: Studies) -> list[Submission]:
    """Resume each run whose process died.

    Returns:
        The new submissions.

    Raises:
        ControlError: The SuperLink does not answer.
    """
    if not studies.may_have_crashed_runs():
        return []
    statuses = studies.statuses()
    already_resumed = {status.submission.resumes for status in statuses}
    resumed = []
    for status in statuses:
        submission = status.submission
        if submission.run_id in already_resumed or not status.crashed:
            continue
        attempts = _count_attempts(submission, statuses)
        if attempts >= MAX_ATTEMPTS:
            log.warning(
                "run %s died %d times without a further round: not resumed", submission.run_id, attempts
            )
            continue
        resumed.append(studies.resume(submission.run_id))
        log.warning("run %s died: resumed as run %s", submission.run_id, resumed[-1].run_id)
    return resumed


def _count_attempts(submission: Submission, statuses: list[SubmissionStatus]) -> int:
    """Count the runs in this folder that were started since its last finished round."""
    events = RunDir(Path(submission.folder)).events()
    last = max((event["time"] for event in events if event["kind"] == "round_end"), default=0.0)
    same = [status.submission for status in statuses if status.submission.folder == submission.folder]
    return sum(other.submitted_at.replace(tzinfo=UTC).timestamp() >= int(last) for other in same)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    watch(ServerHome(Path(sys.argv[1])))
