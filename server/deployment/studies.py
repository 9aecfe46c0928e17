"""Studies at a server: handing them to Flower, watching, stopping and going on with them.

A study is checked here before anything is sent, is written into the server's folder as resolved, and is known
by the digest of that text: the same study twice is refused unless it is asked for.
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
from fedsigma.server.deployment.flower_control import ControlError, FlowerControl, Run
from fedsigma.server.deployment.home import ServerHome, ServerHomeError
from fedsigma.server.federation.privacy_plan import check_budget
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.app_bundle import write_app
from fedsigma.server.trackers import parse_trackers

__all__ = ["Studies", "SubmissionStatus"]

POLL_S = 2.0
FOLLOW_S = 60.0
"""How long it is waited for that a run whose process died is gone on with."""
UNKNOWN = "not known to the SuperLink"


@dataclass(frozen=True)
class SubmissionStatus:
    """One submission and how it is: Flower's word, and the rounds done so far."""

    submission: Submission
    status: str
    rounds: int

    @property
    def active(self) -> bool:
        """Whether it is waiting or running."""
        return not self.status.startswith("finished") and self.status != UNKNOWN

    @property
    def crashed(self) -> bool:
        """Whether it failed without saying why: it never started, or did not come to its end."""
        return self.status == "finished:failed" and not has_ended(self.submission)


def has_ended(submission: Submission) -> bool:
    """Whether a run's folder says that it started and ended, well or not."""
    events = RunDir(Path(submission.folder)).events()
    ends = [e for e in events if e["kind"] in ("run_start", "run_end")]
    started = any(e.get("run") == submission.run_id for e in ends)
    return started and ends[-1]["kind"] == "run_end"


class Studies:
    """The studies of a server.

    Args:
        folder: the server's.
        control: how its SuperLink is reached.
        by: the user for whom it is done, for the audit log; empty for who has this machine's command line.
    """

    def __init__(self, folder: ServerHome, control: FlowerControl | None = None, *, by: str = "") -> None:
        self._folder, self._by = folder, by
        self._control = control or FlowerControl(folder)
        self._registry = ServerDatabase(folder.path / "server.db")
        self._log = ServerAuditLog(folder.path)

    def submit(
        self, study: str, *, again: bool = False, rounds: int = 0, seed: int = -1, trackers: str = ""
    ) -> Submission:
        """Check a study and hand it to Flower.

        Args:
            study: the name of a study that comes with FedSigma, or the path of a study file.
            again: also if the same study runs or ran to its end.
            rounds, seed: instead of the study's own (0 and -1: the study's own).
            trackers: names of experiment trackers, by commas, besides those of $FEDSIGMA_TRACKERS.

        Raises:
            ConfigError: the study does not read, its privacy budget does not allow a round, or there is no
                such tracker.
            ServerError: the same study was submitted before.
            ControlError: the SuperLink does not answer.
        """
        parse_trackers(trackers)
        config = load_study(study).replaced(rounds=rounds or None, seed=seed if seed >= 0 else None)
        # Sites have their own images, and nobody has all of them: what a simulation needs is not sent.
        config = replace(config, data=None, baselines=tuple(b for b in config.baselines if b != "pooled"))
        check_budget(config)
        text = config.to_yaml()
        digest = hashlib.sha256(text.encode()).hexdigest()
        for one in self.statuses(study=config.name) if not again else ():
            if one.submission.digest == digest and (one.active or one.status == "finished:completed"):
                raise ServerHomeError(
                    f"study '{config.name}' was submitted before as run {one.submission.run_id}, which is"
                    f" {one.status}: `--again` submits it all the same"
                )
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{config.name}-{stamp}-s{config.seed}"
        file = self._folder.path / "studies" / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return self._start(config, digest, file, self._folder.path / "runs" / name, trackers=trackers)

    def resume(self, run: str) -> Submission:
        """Go on with a run that ended before its last round, or begin one that ended before its first.

        Raises:
            ServerError: there is no such run, or it is running or completed.
            ControlError: the SuperLink does not answer.
        """
        one = self.find(run)
        if one.active or one.status == "finished:completed":
            raise ServerHomeError(
                f"run {one.submission.run_id} is {one.status}: there is nothing to go on with"
            )
        path = Path(one.submission.folder)
        file = self._folder.path / "studies" / f"{path.name}.yaml"
        if (path / "study.yaml").is_file():
            file.write_text(RunDir.open(path).study_yaml, encoding="utf-8")
        config = StudyConfig.from_yaml(file.read_text(encoding="utf-8"), where=str(file))
        return self._start(config, one.submission.digest, file, path, resumes=one.submission.run_id)

    def stop(self, run: str) -> Submission:
        """Stop a run; what it has done stays, and `resume` goes on with it.

        Raises:
            ServerError: there is no such run, or it has ended.
            ControlError: the SuperLink does not answer.
        """
        one = self.find(run)
        if not one.active:
            raise ServerHomeError(f"run {one.submission.run_id} is {one.status}: there is nothing to stop")
        self._control.stop(one.submission.run_id)
        self._note("study_stopped", one.submission)
        return one.submission

    def may_have_crashed_runs(self) -> bool:
        """Whether any submission may have died: by the folders alone, without asking the SuperLink."""
        made = self._registry.submissions()
        resumed = {one.resumes for one in made}
        return any(one.run_id not in resumed and not has_ended(one) for one in made)

    def statuses(self, *, study: str | None = None) -> list[SubmissionStatus]:
        """All submissions, or a study's, the latest first.

        Raises:
            ControlError: the SuperLink does not answer.
        """
        runs = self._control.runs()
        return [self._seen(one, runs) for one in self._registry.submissions(study=study)]

    def find(self, run: str) -> SubmissionStatus:
        """The submission with this run number, or the latest of the study of this name.

        Raises:
            ServerError: there is none.
        """
        for one in self.statuses():
            if run in (one.submission.run_id, one.submission.study):
                return one
        raise ServerHomeError(f"there is no run or study '{run}' here: `fedsigma study status` lists them")

    def watch(self, run: str) -> Iterator[SubmissionStatus]:
        """How a run is, every few seconds until it has ended; a SuperLink that is down is waited for.

        A run that goes on as another, because its process died or somebody resumed it, is followed.

        Raises:
            ServerError: there is no such run.
        """
        if not any(run in (one.run_id, one.study) for one in self._registry.submissions()):
            raise ServerHomeError(
                f"there is no run or study '{run}' here: `fedsigma study status` lists them"
            )
        patience = 0
        while True:
            try:
                one = self.find(run)
            except ControlError:
                time.sleep(POLL_S)
                continue
            # A study that is submitted again meanwhile does not change which run is watched.
            run = one.submission.run_id
            yield one
            patience = patience + 1 if one.crashed else 0
            if after := [s.run_id for s in self._registry.submissions() if s.resumes == run]:
                run = after[0]
            elif not one.active and not 0 < patience <= FOLLOW_S / POLL_S:
                return
            time.sleep(POLL_S)

    def logs(self, run: str, *, follow: bool) -> int:
        """Print the log of a run's ServerApp; returns the exit code of the command that does it."""
        command = self._control.log_command(self.find(run).submission.run_id, follow=follow)
        done = subprocess.run(command, env=self._control.environment, cwd=self._folder.path, check=False)
        return done.returncode

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
        values = {"study": str(file), "out": str(folder), "resume": (folder / "study.yaml").is_file()}
        values["trackers"] = trackers
        run = self._control.start(write_app(self._folder.path / "flwr" / "app"), values)
        made = Submission(
            run_id=run,
            study=config.name,
            digest=digest,
            folder=str(folder),
            submitted_at=utc_now(),
            resumes=resumes,
        )
        with self._registry.session() as session:
            session.add(made)
        self._note("study_resumed" if resumes else "study_submitted", made)
        return made

    def _seen(self, one: Submission, runs: dict[str, Run]) -> SubmissionStatus:
        path = Path(one.folder)
        rounds = 0
        if (path / "study.yaml").is_file():
            rounds = max((row["round"] for row in RunDir.open(path).rounds()), default=0)
        return SubmissionStatus(one, runs[one.run_id].status if one.run_id in runs else UNKNOWN, rounds)

    def _note(self, kind: str, one: Submission) -> None:
        whose = {"by": self._by} if self._by else {}
        self._log.record(kind, study=one.study, run=one.run_id, digest=one.digest, **whose)
