"""A site's policy, images and files, as one process sees them.

A real site has a `site.yaml` that limits which tasks it accepts and names its data source; no message can
widen these limits. A simulated site is one part of the study's data, and its policy accepts every task.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsigma.client.site.identity import NoIdentity, read_identity, simulated_identity
from fedsigma.client.site.image_cache import IMAGES
from fedsigma.client.site.personal_state import PersonalState, safe_name
from fedsigma.client.site.policy import SitePolicy
from fedsigma.client.site.privacy_ledger import LedgerEntry, PrivacyLedger
from fedsigma.common.config.constants import PRIVACY_LEVELS
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.data.sources import site_data as data_of
from fedsigma.common.privacy.accounting import PrivacyEvent
from fedsigma.common.training.trainer import Trainer, derive_seed, open_trainer
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.common.wire.records import StudySpec, TrainTask

if TYPE_CHECKING:
    from fedsigma.common.data.loading import SiteData

__all__ = [
    "BackboneNotAllowed",
    "CohortTooSmall",
    "NotMasked",
    "NotPrivate",
    "Site",
    "SiteCountDiffers",
    "StudyNotAllowed",
    "TooManyEvaluations",
    "TooManyRounds",
    "TooManySteps",
    "open_site",
]


# The server receives the name of the exception's type and nothing else, so each name states the reason.
class StudyNotAllowed(FedSigmaError, ValueError):
    """The site's policy does not list this study."""


class BackboneNotAllowed(FedSigmaError, ValueError):
    """The site's policy does not list this backbone."""


class TooManySteps(FedSigmaError, ValueError):
    """The task has more local steps than the site's policy allows."""


class TooManyRounds(FedSigmaError, ValueError):
    """The task's round is above the limit of the site's policy."""


class TooManyEvaluations(FedSigmaError, ValueError):
    """The task evaluates more models of a study on the test images than the site's policy allows."""


class CohortTooSmall(FedSigmaError, ValueError):
    """The task averages fewer sites together than the site's policy requires."""


class NotMasked(FedSigmaError, ValueError):
    """The site's policy requires secure aggregation, and the task does not use it."""


class NotPrivate(FedSigmaError, ValueError):
    """The site's policy requires differential privacy at a level that the task does not provide."""


class SiteCountDiffers(FedSigmaError, ValueError):
    """The number of sites of the federation is not that of the study."""

    def __init__(self, *, sites: int, federation: int) -> None:
        super().__init__(f"the study has {sites} sites, the federation {federation}")
        self.sites = sites


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site, as this process sees it.

    Attributes:
        name: Name of the site.
        policy: What the site accepts.
        base: Folder that relative paths of the policy refer to.
        audit_path: File of the audit log.
        ledger_path: File of the privacy ledger.
        personal_path: Folder of the personal values.
        sites: Number of sites of the simulation; 0 for a real site.
    """

    name: str
    policy: SitePolicy
    base: Path
    audit_path: Path
    ledger_path: Path
    personal_path: Path
    sites: int = 0

    def check_study(self, study: StudySpec) -> None:
        """Reject a study or backbone that the site's policy does not list.

        Raises:
            StudyNotAllowed: The policy does not list the study.
            BackboneNotAllowed: The policy does not list the backbone.
        """
        if "*" not in self.policy.studies and study.name not in self.policy.studies:
            raise StudyNotAllowed(f"study '{study.name}' is not in site.yaml's list of studies")
        if not self.sites and study.backbone not in self.policy.backbones:
            raise BackboneNotAllowed(f"backbone '{study.backbone}' is not in site.yaml's list of backbones")

    def check_task(self, task: TrainTask) -> None:
        """Reject a training task that exceeds the site's policy.

        Raises:
            FedSigmaError: One of this module's exceptions, whose name states the reason.
        """
        policy, privacy = self.policy, task.privacy
        self.check_study(task.study)
        if task.steps > policy.max_local_steps:
            raise TooManySteps(f"{task.steps} local steps; site.yaml allows {policy.max_local_steps}")
        if task.round > policy.max_rounds:
            raise TooManyRounds(f"round {task.round}; site.yaml allows {policy.max_rounds}")
        if task.cohort < policy.min_cohort:
            raise CohortTooSmall(f"cohort of {task.cohort} sites; site.yaml requires {policy.min_cohort}")
        if task.members and len(task.members) != task.cohort:
            raise CohortTooSmall(f"cohort of {task.cohort} sites, but {len(task.members)} members are listed")
        if policy.require_masking and not task.members:
            raise NotMasked("site.yaml requires secure aggregation")
        if task.mode == "local" and privacy.of_sites:
            raise NotPrivate("local training reveals the site's update, which the privacy level 'site' hides")
        level = PRIVACY_LEVELS.index(privacy.level) if privacy.in_training else 0
        if level < PRIVACY_LEVELS.index(policy.privacy):
            raise NotPrivate(
                f"site.yaml requires privacy of each {policy.privacy}, the task's level is {privacy.level}"
            )

    def personal_state(self, study: StudySpec, trainer: Trainer, *, run: str) -> PersonalState:
        """Return this site's personal part of the shift in a run of a study."""
        return PersonalState(
            self.personal_path,
            study=study.name,
            run=run,
            partition=trainer.partition(study.personal),
            fingerprint=trainer.fingerprint,
        )

    def charge_privacy(self, task: TrainTask, event: PrivacyEvent, *, run: str) -> float:
        """Enter a private release of this site's images into the ledger, before it happens.

        Returns:
            The epsilon spent for this study so far, at the study's delta.

        Raises:
            PrivacyBudgetSpent: The budget of the study or of the site does not allow it.
            LedgerDamaged: The ledger was changed, so the amount spent is unknown.
        """
        entry = LedgerEntry(
            study=task.study.name,
            run=run,
            round=task.round,
            mode=task.mode,
            level=task.privacy.level,
            event=event,
        )
        policy, path = self.policy, self.ledger_path
        if self.sites:  # simulated images are no patients of a site: each run has a ledger of its own
            path = path.with_stem(f"{path.stem}-{task.run}")
        return PrivacyLedger(path).charge(entry, task.privacy, budget=policy.epsilon, delta=policy.delta)

    def charge_evaluation(self, study: StudySpec, versions: int) -> None:
        """Count evaluations on the site's test images, before they happen.

        A server that may evaluate any number of models of its own choice can reconstruct labels from the
        metrics.

        Raises:
            TooManyEvaluations: The site's policy allows fewer for this study.
            LogTampered: The log was changed, so the number of evaluations is unknown.
        """
        if self.sites:
            return
        log = HashChainedLog(self.ledger_path.with_name("evaluations.jsonl"))
        with log.locked() as append:
            before = sum(int(line["models"]) for line in log.lines() if line["study"] == study.name)
            if before + versions > self.policy.max_evaluations:
                raise TooManyEvaluations(
                    f"{versions} more evaluations of study '{study.name}' after {before}; site.yaml allows"
                    f" {self.policy.max_evaluations}"
                )
            append({"time": round(time.time(), 3), "study": study.name, "models": versions})

    @property
    def has_identity(self) -> bool:
        """Whether this site can take part in secure aggregation."""
        return bool(self.sites or self.policy.identity)

    def identity(self) -> Ed25519PrivateKey:
        """Return the site's private key.

        Raises:
            NoIdentity: site.yaml names no identity, or the file holds no Ed25519 key.
        """
        if self.sites:
            return simulated_identity(self.name)
        if not self.policy.identity:
            raise NoIdentity("site.yaml names no identity: create one with `fedsigma identity FILE`")
        return read_identity(self.base / Path(self.policy.identity).expanduser())

    def peers(self, study: StudySpec) -> dict[str, bytes]:
        """Return the public keys of all sites that this site knows, its own among them."""
        own_key = {self.name: self.identity().public_key().public_bytes_raw()}
        if not self.sites:
            return {name: bytes.fromhex(key) for name, key in self.policy.peers.items()} | own_key
        _, parts = data_of.simulated_sites(study.data, study.classes, study.seed)
        return {name: simulated_identity(name).public_key().public_bytes_raw() for name in parts}

    def trainer(self, study: StudySpec) -> Trainer:
        """Return the trainer of this study, with the backbone as it is stored at this site."""
        backbone = study.backbone if self.sites else self.policy.backbones[study.backbone]
        return open_trainer(backbone, study.sigma, study.classes, study.prompts)

    def images(self, study: StudySpec, *, side: int) -> SiteData:
        """Return the site's training and test images, decoded at their first use in this process."""
        return IMAGES.get((self, study, side), lambda: _load(self, study, side))

    def __hash__(self) -> int:
        return hash((self.name, self.sites, self.base))


def _load(site: Site, study: StudySpec, side: int) -> SiteData:
    if site.sites:
        source, parts = data_of.simulated_sites(study.data, study.classes, study.seed)
        records, data = parts[site.name], study.data
        on_problem = data.on_problem if data else "stop"
    else:
        from fedsigma.common.data.sources.registry import open_source

        policy, on_problem = site.policy, site.policy.on_problem
        source = open_source(policy.source, base=site.base, **policy.options)
        records = data_of.usable_records(
            source,
            classes=study.classes,
            test_share=policy.test_share,
            on_problem=policy.on_problem,
            # Independent of the study's seed: otherwise another study could test on images trained on here.
            seed=derive_seed(0, site.name, "split", 0),
        )
    return data_of.load_site(
        source,
        records,
        name=site.name,
        classes=study.classes,
        shots=study.shots,
        seed=study.seed,
        side=side,
        on_problem=on_problem,
        max_examples=site.policy.max_examples,
    )


def open_site(node_config: Mapping[str, Any], study: StudySpec, *, run: str) -> Site:
    """Return the site that this process belongs to.

    A node with `site-config` (or the environment variable FEDSIGMA_SITE) is a real site; a node that has
    only `partition-id` is a site of a simulation, with an audit log of its own in each run.

    Raises:
        ConfigError: The node has neither, or site.yaml is invalid.
        SiteCountDiffers: The numbers of sites of the federation and of the study differ.
    """
    file = str(node_config.get("site-config") or os.environ.get("FEDSIGMA_SITE") or "")
    if file:
        path = Path(file).expanduser().resolve()
        policy, base = SitePolicy.read(path), path.parent
        return Site(
            name=policy.name,
            policy=policy,
            base=base,
            audit_path=base / Path(policy.audit).expanduser(),
            ledger_path=base / Path(policy.ledger).expanduser(),
            personal_path=base / Path(policy.personal).expanduser(),
        )
    if "partition-id" not in node_config or not study.data:
        raise ConfigError("this node has no site.yaml: start it with --node-config 'site-config=\"PATH\"'")
    _, parts = data_of.simulated_sites(study.data, study.classes, study.seed)
    federation = int(node_config["num-partitions"])
    if federation != len(parts):
        raise SiteCountDiffers(sites=len(parts), federation=federation)
    name = list(parts)[int(node_config["partition-id"])]
    policy = SitePolicy(
        name=name,
        source="simulation",
        studies=("*",),
        max_local_steps=2**31,
        max_examples=2**31,
        max_rounds=2**31,
        min_cohort=1,
        max_cohorts=10,
        # In a simulation the server has access to the images anyway.
        share_confusion=True,
        allow_attribution=True,
        allow_explanation=True,
    )
    from platformdirs import user_state_path

    file_name = safe_name(name)
    audit = Path(os.environ.get("FEDSIGMA_AUDIT") or user_state_path("fedsigma") / "audit")
    return Site(
        name=name,
        policy=policy,
        base=Path(),
        audit_path=audit / run / f"{file_name}.jsonl",
        # Outside the run's folder, because a resumed study is another run of Flower.
        ledger_path=audit / "privacy" / f"{file_name}.jsonl",
        personal_path=audit / "personal" / file_name,
        sites=len(parts),
    )
