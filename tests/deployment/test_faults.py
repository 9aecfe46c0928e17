"""Two faults in one round of a study. `bench/faults.py` has the whole list, one study for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsigma.server.runs.run_dir import RunDir
from tests.deployment.faults import (
    FAULTS,
    HIT,
    Fault,
    logs_are_whole,
    parts,
    problems,
    study_file,
    study_with_fault,
)
from tests.deployment.parts import Deployment, missing, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "it is"),
]


def test_a_killed_worker_and_a_cut_cable_cost_their_sites_a_part_of_a_round_at_most(
    deployment: Deployment, tmp_path: Path
) -> None:
    wait_for(deployment.online, "all sites are online")

    def cause(deployment: Deployment, folder: RunDir) -> None:
        FAULTS["worker"].cause(deployment, folder)
        if deployment.network.apart:
            run = str(folder.events()[0]["run"])
            # A worker is started before its node has the whole message, and waits for what is missing.
            wait_for(lambda: deployment.received("south", run, 2), "the site has the message")
            deployment.network.cut("south")
            try:
                wait_for(lambda: not deployment.busy("south"), "the site has done its work")
            finally:
                deployment.network.heal("south")

    fault = Fault("both", cause, may_lose=parts(HIT, 2) | parts("south", 2))
    outcome = study_with_fault(deployment, "both", fault, study_file(tmp_path), None)
    assert problems(outcome, fault, tolerance=0) == []
    assert logs_are_whole(deployment) == []
