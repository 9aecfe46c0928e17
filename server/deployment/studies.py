"""Studies at a server: submit, watch, stop and resume them.

A study is checked before anything is sent, and written into the server's folder as resolved. The digest of
this text identifies it: the same study is refused a second time unless the caller asks for it.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.database import ServerDatabase, Submission, utc_now
from fedsigma.server.deployment.flower_control import ControlError, FlowerControl
from fedsigma.server.deployment.home import ServerHome, ServerHomeError
from fedsigma.server.federation.privacy_plan import check_budget
from fedsigma.server.runs.run_dir import RunDir, is_run_folder
from fedsigma.server.simulation.app_bundle import write_app
from fedsigma.server.trackers import parse_trackers

__all__ = ["Studies", "SubmissionStatus"]

POLL_S = 2.0
FOLLOW_S = 60.0
"""How long `watch` waits for a run whose process died to be resumed, in seconds."""
UNKNOWN = "not known to the SuperLink"


@dataclass(frozen=True)
class SubmissionStatus:
    """One submission and its state.

    Attributes:
        submission: The submission.
        status: Flower's status of the run, or `UNKNOWN`.
        rounds: Rounds done so far.
    """

    submission: Submission
    status: str
    rounds: int

    @property
    def active(self) -> bool:
        """Whether the run is waiting or running."""
        return not self.status.startswith("finished") and self.status != UNKNOWN

    @property
    def resumable(self) -> bool:
        """Whether the run has ended without completing."""
        return not self.active and self.status != "finished:completed"

    @property
    def crashed(self) -> bool:
        """Whether the run failed without recording an end: it never started, or its process died."""
        return self.status == "finished:failed" and not has_ended(self.submission)


def has_ended(submission: Submission) -> bool:
    """Return whether a run's folder records that it started and ended, completed or failed."""
    events = RunDir(Path(submission.folder)).events()
    ends = [e for e in events if e["kind"] in ("run_start", "run_end")]
    started = any(e.get("run") == submission.run_id for e in ends)
    return started and ends[-1]["kind"] == "run_end"


class Studies:
    """The studies of a server.

    Args:
        home: The server's folder.
        control: How its SuperLink is reached.
        by: The user to name in the audit log; empty for the command line of this machine.
    """

    def __init__(self, home: ServerHome, control: FlowerControl | None = None, *, by: str = "") -> None:
        self._home, self._by = home, by
        self._control = control or FlowerControl(home)
        self._database = ServerDatabase(home.path)
        self._log = ServerAuditLog(home.path)

    def submit(
        self, study: str, *, again: bool = False, rounds: int = 0, seed: int = -1, trackers: str = ""
    ) -> Submission:
        """Check a study and submit it to Flower.

        Args:
            study: Name of a built-in study, or path of a study file.
            again: Submit the study even if it is running or has completed.
            rounds: Replaces the study's rounds, unless 0.
            seed: Replaces the study's seed, unless -1.
            trackers: Comma-separated experiment trackers, besides those of $FEDSIGMA_TRACKERS.

        Raises:
            ConfigError: The study is invalid, its privacy budget allows no round, or a tracker is unknown.
            ServerHomeError: The same study was submitted before, and `again` is false.
            ControlError: The SuperLink does not answer.
        """
        parse_trackers(trackers)
        config = load_study(study).replaced(rounds=rounds or None, seed=seed if seed >= 0 else None)
        # Sites have their own images, and no one has all of them: settings of simulations are not sent.
        config = replace(config, data=None, baselines=tuple(b for b in config.baselines if b != "pooled"))
        check_budget(config)
        text = config.to_yaml()
        digest = hashlib.sha256(text.encode()).hexdigest()
        for previous in self.statuses(study=config.name) if not again else ():
            if previous.submission.digest == digest and not previous.resumable:
                raise ServerHomeError(
                    f"study '{config.name}' was submitted before as run {previous.submission.run_id}, which"
                    f" is {previous.status}: submit it again with `--again`"
                )
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{config.name}-{stamp}-s{config.seed}"
        file = self._home.path / "studies" / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return self._start(config, digest, file, self._home.path / "runs" / name, trackers=trackers)

    def resume(self, run: str) -> Submission:
        """Resume a run that ended before its last round, or restart one that ended before its first.

        Raises:
            ServerHomeError: The run does not exist, or is running or completed.
            ControlError: The SuperLink does not answer.
        """
        previous = self.find(run)
        if not previous.resumable:
            raise ServerHomeError(
                f"run {previous.submission.run_id} is {previous.status}: there is nothing to resume"
            )
        path = Path(previous.submission.folder)
        file = self._home.path / "studies" / f"{path.name}.yaml"
        if is_run_folder(path):
            file.write_text(RunDir.open(path).study_yaml, encoding="utf-8")
        config = StudyConfig.from_yaml(file.read_text(encoding="utf-8"), where=str(file))
        return self._start(config, previous.submission.digest, file, path, resumes=previous.submission.run_id)

    def stop(self, run: str) -> Submission:
        """Stop a run; its results so far are kept, and it can be resumed.

        Raises:
            ServerHomeError: The run does not exist, or has ended.
            ControlError: The SuperLink does not answer.
        """
        status = self.find(run)
        if not status.active:
            raise ServerHomeError(
                f"run {status.submission.run_id} is {status.status}: there is nothing to stop"
            )
        self._control.stop(status.submission.run_id)
        self._record("study_stopped", status.submission)
        return status.submission

    def may_have_crashed_runs(self) -> bool:
        """Return whether any submission may have crashed, by the run folders alone, without the SuperLink."""
        submissions = self._database.submissions()
        resumed = {submission.resumes for submission in submissions}
        return any(s.run_id not in resumed and not has_ended(s) for s in submissions)

    def statuses(self, *, study: str | None = None) -> list[SubmissionStatus]:
        """Return the state of all submissions, or of one study's, the latest first.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        runs = self._control.runs()
        return [self._status_of(submission, runs) for submission in self._database.submissions(study=study)]

    def find(self, run: str) -> SubmissionStatus:
        """Return the submission with this run number, or the latest one of the study of this name.

        Raises:
            ServerHomeError: No submission matches.
            ControlError: The SuperLink does not answer.
        """
        return self._status_of(self._find_submission(run), self._control.runs())

    def watch(self, run: str) -> Iterator[SubmissionStatus]:
        """Yield the state of a run every `POLL_S` seconds until it ends, also while the SuperLink is down.

        If the run is resumed as another run, that one is watched.

        Raises:
            ServerHomeError: The run does not exist.
        """
        self._find_submission(run)
        polls_since_crash = 0
        while True:
            try:
                status = self.find(run)
            except ControlError:
                time.sleep(POLL_S)
                continue
            # A study that is submitted again meanwhile does not change which run is watched.
            run = status.submission.run_id
            yield status
            polls_since_crash = polls_since_crash + 1 if status.crashed else 0
            if successors := [s.run_id for s in self._database.submissions() if s.resumes == run]:
                run = successors[0]
            elif not status.active and not 0 < polls_since_crash <= FOLLOW_S / POLL_S:
                return
            time.sleep(POLL_S)

    def logs(self, run: str, *, follow: bool) -> int:
        """Print the log of a run's ServerApp; returns the exit code of `flwr log`."""
        command = self._control.log_command(self.find(run).submission.run_id, follow=follow)
        done = subprocess.run(command, env=self._control.environment, cwd=self._home.path, check=False)
        return done.returncode

    def _find_submission(self, run: str) -> Submission:
        for submission in self._database.submissions():
            if run in (submission.run_id, submission.study):
                return submission
        raise ServerHomeError(f"there is no run or study '{run}' here: `fedsigma study status` lists them")

    def _start(
        self,
        config: StudyConfig,
        digest: str,
        file: Path,
        folder: Path,
        *,
        resumes: str = "",
        trackers: str = "",
    ) -> Submission:
        values = {"study": str(file), "out": str(folder), "resume": is_run_folder(folder)}
        values["trackers"] = trackers
        run = self._control.start(write_app(self._home.path / "flwr" / "app"), values)
        submission = Submission(
            run_id=run,
            study=config.name,
            digest=digest,
            folder=str(folder),
            submitted_at=utc_now(),
            resumes=resumes,
        )
        with self._database.session() as session:
            session.add(submission)
        self._record("study_resumed" if resumes else "study_submitted", submission)
        return submission

    def _status_of(self, submission: Submission, runs: dict[str, str]) -> SubmissionStatus:
        path, rounds = Path(submission.folder), 0
        if is_run_folder(path):
            rounds = max((row["round"] for row in RunDir.open(path).rounds()), default=0)
        return SubmissionStatus(submission, runs.get(submission.run_id, UNKNOWN), rounds)

    def _record(self, kind: str, submission: Submission) -> None:
        user = {"by": self._by} if self._by else {}
        self._log.record(
            kind, study=submission.study, run=submission.run_id, digest=submission.digest, **user
        )
