"""The ServerApp: one study from its first handshake to its summary."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedsigma.common.config.schema import ConfigError, flatten
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.data.sources import site_data
from fedsigma.common.registry import ModelRegistry, registry_folder
from fedsigma.common.registry.publish import publish
from fedsigma.common.training.trainer import Trainer, open_trainer
from fedsigma.server.deployment.audit_log import run_auditor
from fedsigma.server.deployment.database import ServerDatabase
from fedsigma.server.evaluation.model_versions import evaluate_versions
from fedsigma.server.evaluation.results import evaluate_study, write_summary
from fedsigma.server.federation import checkpoint
from fedsigma.server.federation.aggregation import Aggregator
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.privacy_plan import check_budget
from fedsigma.server.federation.rounds import train
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.runs.summary import runs_folder
from fedsigma.server.trackers import TrackerCallback, choose_trackers

__all__ = ["app"]

app = ServerApp()

SITE_HEADS, SITE_DESCRIPTIONS = 3, 3
"""How many heads are explained of a single site's shift, and by how many descriptions each way."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run configuration names; an exception makes Flower call the run failed."""
    config, run = context.run_config, str(context.run_id)
    study = _load_study(config)
    check_budget(study)
    Aggregator(study)  # refuses invalid options before there is a run folder
    trackers = choose_trackers(str(config.get("trackers", "")))
    run_dir, resumed = _open_run_dir(config, study)
    with run_dir.lock():
        print(f"FedSigma: study '{study.name}', run folder {run_dir.path}", flush=True)
        if auditor := run_auditor(study=study.name, run=run):
            run_dir.listen(auditor)
        with closing(TrackerCallback(run_dir, trackers, study=study, run=run)):
            run_dir.log_event("run_start", study=study.name, run=run, resume=resumed)
            _run(grid, run_dir, study)


def _run(grid: Grid, run_dir: RunDir, study: StudyConfig) -> None:
    """Run a study in its folder and record how it ended."""
    try:
        summary = _run_study(grid, run_dir, study)
        run_dir.log_event("run_end", ok=True, reason="")
    except Exception as error:
        run_dir.log_event("run_end", ok=False, reason=str(error) or type(error).__name__)
        _report(run_dir, {})
        raise
    except BaseException as signal:
        # Stopped, or the process around this one died: the run can be resumed.
        run_dir.log_event("run_interrupted", by=type(signal).__name__)
        raise
    _report(run_dir, summary)


def _run_study(grid: Grid, run_dir: RunDir, study: StudyConfig) -> dict[str, Any]:
    """Wait for the sites, train with them or evaluate versions, and return the summary."""
    started = time.monotonic()
    # Every problem of a simulation's data is reported before training starts.
    if study.data and (problems := site_data.check_pictures(study.data, study.classes, study.seed)):
        print(problems, flush=True)
        run_dir.log_event("data_problems", report=problems)
    trainer = open_trainer(study.backbone, study.sigma, study.classes, study.prompts)
    partition = trainer.partition(study.personal)
    run_dir.log_event("model_ready", parameters=trainer.parameter_count, values=partition.shared.size)
    nodes = None if study.data else ServerDatabase.from_environment()
    federation = Federation(study, run_dir, Messenger(grid), partition, trainer.fingerprint, nodes)
    shift, done = checkpoint.load(federation)
    federation.site_manager.wait_for_sites()
    if study.evaluate_versions:
        summary = evaluate_versions(federation)
        write_summary(run_dir, summary, started)
        return summary
    shift = train(federation, shift, done=done)
    summary = evaluate_study(federation, trainer, shift, started)
    _explain(federation, trainer, shift, summary)
    _publish(run_dir, study, summary, federation.site_manager.allow_attribution)
    return summary


def _load_study(config: Mapping[str, Any]) -> StudyConfig:
    """Load the study, with the run's own rounds and seed where they are given (0 and -1: the study's)."""
    rounds, seed = int(config.get("rounds", 0)), int(config.get("seed", -1))
    study = load_study(str(config["study"]))
    return study.replaced(rounds=rounds if rounds > 0 else None, seed=seed if seed >= 0 else None)


def _open_run_dir(config: Mapping[str, Any], study: StudyConfig) -> tuple[RunDir, bool]:
    """Create the run folder, or open the one to resume; returns it and whether the run is resumed."""
    out = str(config.get("out", ""))
    if bool(config.get("resume", False)):
        if not out:
            raise ConfigError('resume=true needs out="PATH", the folder of the run to resume')
        run_dir = RunDir.open(Path(out).expanduser().resolve())
        _check_same_study(
            study, StudyConfig.from_yaml(run_dir.study_yaml, where=str(run_dir.path)), run_dir.path
        )
        return run_dir, True
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(out).expanduser() if out else runs_folder() / f"{study.name}-{stamp}-s{study.seed}"
    return RunDir.create(path.resolve(), study.to_yaml()), False


def _check_same_study(study: StudyConfig, recorded: StudyConfig, path: Path) -> None:
    """Check that a run to resume has the same study.

    Raises:
        ConfigError: A setting that shapes the result differs.
    """
    # Waiting times do not shape the result, and may be why the run was interrupted.
    ignored = {f"federation.{name}" for name in ("round_timeout_s", "wait_for_sites_s", "min_sites")}
    settings, earlier = (dict(flatten(asdict(config))) for config in (study, recorded))
    if different := sorted(
        key
        for key in settings.keys() | earlier.keys()
        if key not in ignored and settings.get(key) != earlier.get(key)
    ):
        raise ConfigError(
            f"{path} holds a run with other settings ({', '.join(different)}): resume with the same study,"
            " rounds and seed, or start a new run in another folder"
        )


def _report(run_dir: RunDir, summary: dict[str, Any]) -> None:
    """Write the report and print where it is. A report that fails does not fail the run."""
    for method in ("zero_shot", "local_only", "pooled", "shared_only", "federated"):
        if method in summary:
            print(f"FedSigma: {method:<10} accuracy {summary[method]['accuracy']:.4f}", flush=True)
    for name, entry in summary.get("versions", {}).items():
        print(f"FedSigma: {name} accuracy {entry['accuracy']:.4f}", flush=True)
    try:
        from fedsigma.server.report import write_report

        print(f"FedSigma: report {write_report(run_dir)}", flush=True)
    except Exception as error:
        print(f"FedSigma: the report could not be written: {error}", flush=True)


def _explain(
    federation: Federation, trainer: Trainer, shift: NDArray[np.float32], summary: dict[str, Any]
) -> None:
    """Explain the shared shift, and each site's own more briefly. A failure does not fail the run."""
    combine = federation.partition.combine
    try:
        summary["explanation"] = trainer.explain(combine(shift))
        if by_site := {
            site: trainer.explain(combine(site_shift), heads=SITE_HEADS, phrases=SITE_DESCRIPTIONS)
            for site, site_shift in federation.explainable_shifts()
        }:
            summary["explanation_by_site"] = by_site
    except Exception as error:
        print(f"FedSigma: the adaptation could not be explained: {error}", flush=True)
    federation.run_dir.write_summary(summary)


def _publish(run_dir: RunDir, study: StudyConfig, summary: dict[str, Any], named: set[str]) -> None:
    """Publish the run's model as a version of the registry. A failure does not fail the run."""
    try:
        registry = ModelRegistry(registry_folder(run_dir.path.parent))
        version = publish(
            registry, run_dir.path, summary, named=named, private=_privacy_statement(run_dir, study)
        )
        run_dir.log_event("published", model=version.manifest.reference, folder=str(version.path))
        print(f"FedSigma: model {version.manifest.reference} in {version.path}", flush=True)
    except Exception as error:
        print(f"FedSigma: the model was not registered: {error}", flush=True)


def _privacy_statement(run_dir: RunDir, study: StudyConfig) -> str:
    """The privacy guarantee in words, for the model card; empty without differential privacy."""
    if study.privacy.level == "none":
        return ""
    epsilon = max((row["epsilon"] for row in run_dir.rounds() if row["epsilon"] is not None), default=None)
    value = "unknown" if epsilon is None else f"{epsilon:.2f}"
    return (
        f"Training was differentially private for each {study.privacy.level}: epsilon {value} at delta"
        f" {study.privacy.delta:g}."
    )
