"""The ServerApp: one study from its first handshake to its summary."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedsigma.common.config.schema import ConfigError, flatten
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.data.sources import site_data
from fedsigma.common.training.trainer import Trainer, open_trainer
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.wire.records import Evaluation, StudySpec
from fedsigma.server.deployment.audit_log import RunAuditor
from fedsigma.server.deployment.database import NodeNames
from fedsigma.server.evaluation.baselines import Baselines, result
from fedsigma.server.evaluation.model_versions import evaluate_versions
from fedsigma.server.federation import checkpoint
from fedsigma.server.federation.aggregation import ARRAY, make_averaging
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.privacy_plan import check_budget
from fedsigma.server.federation.rounds import BudgetsSpent, SigmaStrategy
from fedsigma.server.federation.site_manager import SiteManager
from fedsigma.server.federation.validation import SiteEvaluation
from fedsigma.server.runs.run_dir import ALL_SITES, RunDir
from fedsigma.server.runs.summary import runs_folder
from fedsigma.server.trackers import TrackerChoice, Tracking, choose_trackers

if TYPE_CHECKING:
    from fedsigma.common.sigma import ParameterPartition

__all__ = ["app", "run_rounds"]

app = ServerApp()

OWN_HEADS, OWN_WORDS = 3, 3
"""How many heads are explained of a site's own shift, and by how many descriptions each way."""


class NoModel(FedSigmaError, RuntimeError):
    """No round produced a model."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run configuration names; raises, so that Flower calls the run failed."""
    config = context.run_config
    study = _study(config)
    check_budget(study)
    averaging = make_averaging(study)
    trackers = choose_trackers(str(config.get("trackers", "")))
    folder, resumed = _folder(config, study)
    with folder.lock():
        print(f"FedSigma: study '{study.name}', run folder {folder.path}", flush=True)
        _run(grid, folder, study, averaging, trackers, run=str(context.run_id), resumed=resumed)


def _run(
    grid: Grid,
    folder: RunDir,
    study: StudyConfig,
    averaging: FedAvg,
    trackers: Sequence[TrackerChoice],
    *,
    run: str,
    resumed: bool,
) -> None:
    """Run a study in its folder, and have the folder say how it ended."""
    if witness := RunAuditor.from_environment(study=study.name, run=run):
        folder.listen(witness)
    tracking = Tracking(folder, trackers, study=study, run=run)
    folder.log_event("run_start", study=study.name, run=run, resume=resumed)
    try:
        summary = _work(grid, folder, study, averaging, resumed=resumed)
        folder.log_event("run_end", ok=True, reason="")
    except Exception as error:
        folder.log_event("run_end", ok=False, reason=str(error) or type(error).__name__)
        _report(folder, {})
        raise
    except BaseException as ended:
        # Stopped, or the process around this one died. The run has not ended: it can be gone on with.
        folder.log_event("run_interrupted", by=type(ended).__name__)
        raise
    else:
        _report(folder, summary)
    finally:
        tracking.close()


def _work(
    grid: Grid, folder: RunDir, study: StudyConfig, averaging: FedAvg, *, resumed: bool
) -> dict[str, Any]:
    """Find the sites, train with them or judge versions, and return the summary."""
    started = time.monotonic()
    _check_pictures(folder, study)
    learner = open_trainer(study.backbone, study.sigma, study.classes, study.prompts)
    split = learner.partition(study.personal)
    folder.log_event("model_ready", parameters=learner.parameter_count, values=split.shared.size)
    shift, done = _zero(split), 0
    if resumed:
        shift, done = checkpoint.latest(
            folder, averaging, study=study, split=split, fingerprint=learner.fingerprint
        )
    exchange = Messenger(grid)
    nodes = None if study.data else NodeNames.from_environment()
    roster = SiteManager(exchange, folder, study, learner.fingerprint, nodes)
    roster.wait_for_sites()
    baselines = Baselines(exchange, roster, folder, study, split)
    if study.evaluate_versions:
        summary = evaluate_versions(folder, study, baselines, learner)
        _write(folder, summary, started)
        return summary
    strategy = SigmaStrategy(averaging, roster, split=split, done=done)
    shift = run_rounds(strategy, shift)
    summary = _results(folder, study, baselines, learner, shift, started)
    _explain(folder, split, learner, shift, strategy.explainable(), summary)
    _publish(folder, study, summary, roster.named)
    return summary


def _study(config: Mapping[str, Any]) -> StudyConfig:
    """Read the study, with the run's own rounds and seed where they are given (0 and -1: the study's)."""
    rounds, seed = int(config.get("rounds", 0)), int(config.get("seed", -1))
    study = load_study(str(config["study"]))
    return study.replaced(rounds=rounds if rounds > 0 else None, seed=seed if seed >= 0 else None)


def _folder(config: Mapping[str, Any], study: StudyConfig) -> tuple[RunDir, bool]:
    """Open the run folder, a new one or the one to go on with."""
    out = str(config.get("out", ""))
    if bool(config.get("resume", False)):
        if not out:
            raise ConfigError('resume=true needs out="PATH", the run folder to go on with')
        folder = RunDir.open(Path(out).expanduser().resolve())
        _same_study(study, StudyConfig.from_yaml(folder.study_yaml, where=str(folder.path)), folder.path)
        return folder, True
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(out).expanduser() if out else runs_folder() / f"{study.name}-{stamp}-s{study.seed}"
    return RunDir.create(path.resolve(), study.to_yaml()), False


def _same_study(now: StudyConfig, then: StudyConfig, path: Path) -> None:
    """Refuse to go on with a run of another study.

    Raises:
        ConfigError: a setting that shapes the result differs.
    """
    # Waiting times do not shape the result, and may be why the run was interrupted.
    free = {f"federation.{name}" for name in ("round_timeout_s", "wait_for_sites_s", "min_sites")}
    mine, theirs = (dict(flatten(asdict(one))) for one in (now, then))
    if different := sorted(
        key for key in mine.keys() | theirs.keys() if key not in free and mine.get(key) != theirs.get(key)
    ):
        raise ConfigError(
            f"{path} holds a run with other settings ({', '.join(different)}): resume with the same study,"
            " rounds and seed, or start anew in another folder"
        )


def _check_pictures(folder: RunDir, study: StudyConfig) -> None:
    """Name everything wrong with a simulation's data before training starts."""
    setup = StudySpec.of(study)
    if setup.data and (problems := site_data.check_pictures(setup.data, setup.classes, setup.seed)):
        print(problems, flush=True)
        folder.log_event("data_problems", report=problems)


def _zero(split: ParameterPartition) -> np.ndarray:
    return np.zeros(split.shared.size, dtype=np.float32)


def run_rounds(strategy: SigmaStrategy, shift: np.ndarray) -> np.ndarray:
    """Run the rounds that are left and return the final shift.

    Raises:
        NoModel: there were rounds to run, and none produced a model.
    """
    study = strategy.study
    left = study.federation.rounds - strategy.done
    if left == 0:
        return shift
    try:
        found = strategy.start(
            strategy.exchange.grid,
            ArrayRecord({ARRAY: Array(shift)}),
            num_rounds=left,
            timeout=study.federation.round_timeout_s,
        )
    except BudgetsSpent as spent:
        print(f"FedSigma: {spent}", flush=True)
        strategy.folder.log_event("budgets_exhausted", round=spent.round)
        if strategy.models or strategy.done:
            return strategy.model
    if strategy.models == 0:
        if strategy.done:  # an earlier process made one
            return strategy.model
        raise NoModel(
            f"none of {left} rounds had {study.federation.min_sites} accepted replies:"
            f" see the events in {strategy.folder.path / 'events.jsonl'}"
        )
    return np.asarray(found.arrays[ARRAY].numpy(), dtype=np.float32)


def _results(
    folder: RunDir,
    study: StudyConfig,
    baselines: Baselines,
    learner: Trainer,
    shift: np.ndarray,
    started: float,
) -> dict[str, Any]:
    """Judge the final model and the study's baselines, and write the summary after each of them."""
    last = study.federation.rounds + 1
    split = learner.partition(study.personal)
    wanted, judged = {"shared_only": shift}, {}
    if "zero_shot" in study.baselines:
        judged["zero_shot"] = _first_round(folder)
        if set(baselines.roster.available().values()) - set(judged["zero_shot"]):
            # A site failed in the first round; asking all again here costs no further message.
            wanted["zero_shot"] = _zero(split)
    # What a site uses is the shared values with its own; without a personal part the two are the same.
    if not split.personal_size:
        judged |= baselines.evaluate(wanted, round=last)
        judged["federated"] = judged.pop("shared_only")
    else:
        judged |= baselines.evaluate({"federated": shift}, round=last, personal=True)
        judged |= baselines.evaluate(wanted, round=last)
    if not judged["federated"]:
        raise NoModel("no site could evaluate the final model")
    for site, one in judged["federated"].items():
        folder.log_round(last, site, one.evaluation.metrics(), 0, 0, "accepted")
    final = result(judged["federated"])
    folder.log_round(last, ALL_SITES, final["metrics"], 0, 0, "pooled")

    summary: dict[str, Any] = {"study": study.name, "rounds": study.federation.rounds}
    summary |= {"sites": sorted(judged["federated"]), "classes": list(study.classes), **_traffic(folder)}
    if "zero_shot" in judged:
        summary["zero_shot"] = result(judged["zero_shot"])
        pooled = summary["zero_shot"]["metrics"]
        folder.log_event("baseline", method="zero_shot", site=ALL_SITES, metrics=pooled)
    summary["federated"] = final
    if "shared_only" in judged:
        summary["shared_only"] = result(judged["shared_only"])
    steps = {
        "local_only": baselines.local_only,
        "pooled": lambda: baselines.pooled(learner),
    }
    for method, compute in steps.items():
        _write(folder, summary, started)
        if method in study.baselines and (found := compute()):
            summary[method] = found
    _write(folder, summary, started)
    return summary


def _first_round(folder: RunDir) -> dict[str, SiteEvaluation]:
    """Return the sites' evaluations of the zero shift, which every site tells in round 1."""
    found = {}
    for row in folder.rounds():
        if row["round"] == 1 and row["status"] == "accepted" and row["test_examples"]:
            told = {name: value for name, value in row.items() if value is not None}
            found[row["site"]] = SiteEvaluation(evaluation=Evaluation.of(told, row["test_examples"]))
    return found


def _write(folder: RunDir, summary: dict[str, Any], started: float) -> None:
    summary["seconds"] = round(time.monotonic() - started, 1)
    folder.summary(summary)


def _traffic(folder: RunDir) -> dict[str, int]:
    """Return the bytes of one site's exchange in one round, both ways: the mean over accepted replies."""
    rows = [row for row in folder.rounds() if row["status"] == "accepted" and row["bytes_up"]]
    count = max(1, len(rows))
    return {
        f"bytes_{way}_per_site_round": round(sum(row[f"bytes_{way}"] for row in rows) / count)
        for way in ("up", "down")
    }


def _report(folder: RunDir, summary: dict[str, Any]) -> None:
    """Write the report and say where everything is. A report that fails does not undo the run."""
    for method in ("zero_shot", "local_only", "pooled", "shared_only", "federated"):
        if method in summary:
            print(f"FedSigma: {method:<10} accuracy {summary[method]['accuracy']:.4f}", flush=True)
    for name, entry in summary.get("versions", {}).items():
        print(f"FedSigma: {name} accuracy {entry['accuracy']:.4f}", flush=True)
    try:
        from fedsigma.server.report import write_report

        print(f"FedSigma: report {write_report(folder)}", flush=True)
    except Exception as error:
        print(f"FedSigma: the report could not be written: {error}", flush=True)


def _explain(
    folder: RunDir,
    split: ParameterPartition,
    learner: Trainer,
    shift: np.ndarray,
    own: Iterable[tuple[str, np.ndarray]],
    summary: dict[str, Any],
) -> None:
    """Say in words what the shared shift changed, and in fewer what each site's own did.

    What cannot be explained does not undo the run.
    """
    try:
        summary["explanation"] = learner.explain(split.combine(shift))
        if by_site := {
            site: learner.explain(split.combine(one), heads=OWN_HEADS, phrases=OWN_WORDS) for site, one in own
        }:
            summary["explanation_by_site"] = by_site
    except Exception as error:
        print(f"FedSigma: the adaptation is not explained: {error}", flush=True)
    folder.summary(summary)


def _publish(folder: RunDir, study: StudyConfig, summary: dict[str, Any], named: set[str]) -> None:
    """Make the run's model a version of the registry. One that cannot be made does not undo the run."""
    from fedsigma.common.registry import ModelRegistry, registry_folder
    from fedsigma.common.registry.publish import publish

    try:
        shelf = ModelRegistry(registry_folder(folder.path.parent))
        made = publish(shelf, folder.path, summary, named=named, private=_private(folder, study))
        folder.log_event("published", model=made.manifest.reference, folder=str(made.path))
        print(f"FedSigma: model {made.manifest.reference} in {made.path}", flush=True)
    except Exception as error:
        print(f"FedSigma: the model was not registered: {error}", flush=True)


def _private(folder: RunDir, study: StudyConfig) -> str:
    """What differential privacy bounds, in words; empty for nothing."""
    if study.privacy.level == "none":
        return ""
    spent = max((row["epsilon"] for row in folder.rounds() if row["epsilon"] is not None), default=None)
    told = "unknown" if spent is None else f"{spent:.2f}"
    return (
        f"Training was differentially private for each {study.privacy.level}: epsilon {told} at delta"
        f" {study.privacy.delta:g}."
    )
