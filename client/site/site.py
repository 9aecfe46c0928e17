"""The site's own rules and the site's own images.

A real site has a `site.yaml` that bounds what it accepts and says where its images are; nothing a message
says can widen it. In a simulation a site is one part of the study's data, and its rules let all through.
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
    "NoIdentity",
    "NotMasked",
    "NotPrivate",
    "Site",
    "SiteCountDiffers",
    "SitePolicy",
    "StudyNotAllowed",
    "TooManyEvaluations",
    "TooManyRounds",
    "TooManySteps",
    "open_site",
]


# The server sees the names of these types and nothing else, so each names its reason.
class StudyNotAllowed(FedSigmaError, ValueError):
    """The site's policy does not list this study."""


class BackboneNotAllowed(FedSigmaError, ValueError):
    """The site's policy does not list this backbone."""


class TooManySteps(FedSigmaError, ValueError):
    """The task asks for more local steps than the site's policy allows."""


class TooManyRounds(FedSigmaError, ValueError):
    """The task belongs to a later round than the site's policy allows a study to have."""


class TooManyEvaluations(FedSigmaError, ValueError):
    """More models of a study are to be judged on the site's test images than its policy allows."""


class CohortTooSmall(FedSigmaError, ValueError):
    """Fewer sites are averaged together than the site's policy demands."""


class NotMasked(FedSigmaError, ValueError):
    """The site's policy demands masking, and the task does not ask for it."""


class NotPrivate(FedSigmaError, ValueError):
    """The site's policy demands differential privacy, and the task offers none or hides less."""


class SiteCountDiffers(FedSigmaError, ValueError):
    """The federation has more or fewer sites than the study's data are divided into."""

    def __init__(self, *, sites: int, federation: int) -> None:
        super().__init__(f"the study has {sites} sites, the federation {federation}")
        self.sites = sites


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site as this process sees it. sites: the number of sites of a simulation, 0 for a real site."""

    name: str
    policy: SitePolicy
    base: Path
    audit_path: Path
    ledger_path: Path
    personal_path: Path
    sites: int = 0

    def check_study(self, study: StudySpec) -> None:
        """Refuse a study or backbone that the site's policy does not list.

        Raises:
            StudyNotAllowed, BackboneNotAllowed: it is not listed.
        """
        if "*" not in self.policy.studies and study.name not in self.policy.studies:
            raise StudyNotAllowed(f"study '{study.name}' is not in site.yaml's list of studies")
        if not self.sites and study.backbone not in self.policy.backbones:
            raise BackboneNotAllowed(f"backbone '{study.backbone}' is not in site.yaml's list of backbones")

    def check_task(self, task: TrainTask) -> None:
        """Refuse a training task that goes beyond the site's policy.

        Raises:
            StudyNotAllowed, BackboneNotAllowed, TooManySteps, TooManyRounds, CohortTooSmall, NotMasked,
            NotPrivate: it goes beyond the policy.
        """
        self.check_study(task.study)
        if task.steps > self.policy.max_local_steps:
            raise TooManySteps(f"{task.steps} steps, site.yaml allows {self.policy.max_local_steps}")
        if task.round > self.policy.max_rounds:
            raise TooManyRounds(f"round {task.round}, site.yaml allows {self.policy.max_rounds}")
        if task.cohort < self.policy.min_cohort:
            raise CohortTooSmall(f"cohort of {task.cohort}, site.yaml demands {self.policy.min_cohort}")
        if task.members and len(task.members) != task.cohort:
            raise CohortTooSmall(f"cohort of {task.cohort}, {len(task.members)} sites are named")
        if self.policy.require_masking and not task.members:
            raise NotMasked("site.yaml demands that the change is masked")
        if task.mode == "local" and task.privacy.of_sites:
            raise NotPrivate("training alone shows the site's own change, which the task's level is to hide")
        hides = PRIVACY_LEVELS.index(task.privacy.level) if task.privacy.in_training else 0
        if hides < PRIVACY_LEVELS.index(self.policy.privacy):
            raise NotPrivate(
                f"site.yaml demands that training hides each {self.policy.privacy}, the task's"
                f" level is {task.privacy.level}"
            )

    def personal_state(self, study: StudySpec, trainer: Trainer, *, run: str) -> PersonalState:
        """Return this site's own part of the shift in a run of a study."""
        return PersonalState(
            self.personal_path,
            study=study.name,
            run=run,
            partition=trainer.partition(study.personal_config),
            fingerprint=trainer.fingerprint,
        )

    def charge_privacy(self, task: TrainTask, event: PrivacyEvent, *, run: str) -> float:
        """Write down what is about to be released of this site's images.

        Returns:
            The epsilon that has been spent for this study, at the study's delta.

        Raises:
            PrivacyBudgetSpent: the study's budget or the site's own does not allow it.
            LedgerDamaged: what was spent before is not known.
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
        if self.sites:  # the images of a simulation are no patients of a site, so each study begins anew
            path = path.with_stem(f"{path.stem}-{task.run}")
        return PrivacyLedger(path).charge(entry, task.privacy, budget=policy.epsilon, delta=policy.delta)

    def charge_evaluation(self, study: StudySpec, versions: int) -> None:
        """Write down that so many models are about to be judged on the site's test images.

        A score is a function of the images, and whoever may ask for any number of them, of models of their
        own choice, can learn what they like.

        Raises:
            TooManyEvaluations: the site's policy allows fewer for this study; nothing is judged.
            ChainBroken: how many there were is not known.
        """
        if self.sites:
            return
        with HashChainedLog(self.ledger_path.with_name("judged.jsonl")).opened() as log:
            before = sum(int(line["models"]) for line in log.lines() if line["study"] == study.name)
            if before + versions > self.policy.max_evaluations:
                raise TooManyEvaluations(
                    f"{before} models of study '{study.name}' were judged here, site.yaml allows"
                    f" {self.policy.max_evaluations}: {versions} more are not"
                )
            log.append({"time": round(time.time(), 3), "study": study.name, "models": versions})

    @property
    def has_identity(self) -> bool:
        """Whether this site can take part in masked sums."""
        return bool(self.sites or self.policy.identity)

    def identity(self) -> Ed25519PrivateKey:
        """Return the key that says who this site is.

        Raises:
            NoIdentity: site.yaml names none, or the file holds no Ed25519 key.
        """
        if self.sites:
            return simulated_identity(self.name)
        if not self.policy.identity:
            raise NoIdentity("site.yaml names no identity")
        return read_identity(self.base / Path(self.policy.identity).expanduser())

    def peers(self, study: StudySpec) -> dict[str, bytes]:
        """Return the public keys of the sites that this one knows, and its own."""
        own = {self.name: self.identity().public_key().public_bytes_raw()}
        if not self.sites:
            return {name: bytes.fromhex(key) for name, key in self.policy.peers.items()} | own
        _, parts = data_of.simulated_sites(study.data, study.classes, study.seed)
        return {name: simulated_identity(name).public_key().public_bytes_raw() for name in parts}

    def trainer(self, study: StudySpec) -> Trainer:
        """Return the learner of this study, with the backbone from where it lies at this site."""
        backbone = study.backbone if self.sites else self.policy.backbones[study.backbone]
        return open_trainer(backbone, study.sigma, study.classes, study.prompts)

    def images(self, study: StudySpec, *, side: int) -> SiteData:
        """Return the site's training and test images, kept between messages. Units: side in pixels."""
        key = self, study, side
        if key not in _kept:
            _kept[key] = _load(self, study, side)
            while len(_kept) > 1 and sum(map(_bytes, _kept.values())) > MOST_IMAGE_BYTES:
                del _kept[next(iter(_kept))]
        return _kept[key]

    def __hash__(self) -> int:
        return hash((self.name, self.sites, self.base))


MOST_IMAGE_BYTES = 2**30
"""How much of decoded images a process keeps; a process of a simulation may work for a hundred sites."""
_kept: dict[tuple[Site, StudySpec, int], SiteData] = {}


def _bytes(images: SiteData) -> int:
    return sum(example.image.nbytes for part in (images.train, images.test) for example in part)


def _load(site: Site, setup: StudySpec, side: int) -> SiteData:
    if site.sites:
        source, parts = data_of.simulated_sites(setup.data, setup.classes, setup.seed)
        records, data = parts[site.name], setup.data_config
        on_problem = data.on_problem if data else "stop"
    else:
        from fedsigma.common.data.sources.registry import open_source

        policy, on_problem = site.policy, site.policy.on_problem
        source = open_source(policy.source, base=site.base, **policy.options)
        records = data_of.usable_records(
            source,
            classes=setup.classes,
            test_share=policy.test_share,
            on_problem=policy.on_problem,
            # Not by the study's seed: another study's would make test images of those that were trained on.
            seed=derive_seed(0, site.name, "split", 0),
        )
    return data_of.load_site(
        source,
        records,
        name=site.name,
        classes=setup.classes,
        shots=setup.shots,
        seed=setup.seed,
        side=side,
        on_problem=on_problem,
        max_examples=site.policy.max_examples,
    )


def open_site(node_config: Mapping[str, Any], study: StudySpec, *, run: str) -> Site:
    """Find out which site this process is.

    A node with `site-config` (or the environment variable FEDSIGMA_SITE) is a real site; a node that has
    only `partition-id` is one of a simulation's sites.

    Raises:
        ConfigError: neither is given, or site.yaml does not read.
        SiteCountDiffers: the simulation's federation and the study differ in their number of sites.
    """
    file = str(node_config.get("site-config") or os.environ.get("FEDSIGMA_SITE") or "")
    if file:
        path = Path(file).expanduser().resolve()
        policy = SitePolicy.read(path)
        return Site(
            name=policy.name,
            policy=policy,
            base=path.parent,
            audit_path=path.parent / Path(policy.audit).expanduser(),
            ledger_path=path.parent / Path(policy.ledger).expanduser(),
            personal_path=path.parent / Path(policy.personal).expanduser(),
        )
    if "partition-id" not in node_config or not study.data:
        raise ConfigError("this node has no site.yaml: start it with --node-config 'site-config=\"PATH\"'")
    _, parts = data_of.simulated_sites(study.data, study.classes, study.seed)
    federation = int(node_config["num-partitions"])
    if federation != len(parts):
        raise SiteCountDiffers(sites=len(parts), federation=federation)
    name = list(parts)[int(node_config["partition-id"])]
    anything = SitePolicy(
        name=name,
        source="simulation",
        studies=("*",),
        max_local_steps=2**31,
        max_examples=2**31,
        max_rounds=2**31,
        min_cohort=1,
        max_cohorts=10,
        # The server of a simulation has these images itself.
        share_confusion=True,
        allow_attribution=True,
        allow_explanation=True,
    )
    folder, safe = _simulated_folder(run, name)
    return Site(
        name=name,
        policy=anything,
        base=Path(),
        audit_path=folder / f"{safe}.jsonl",
        # Not in the run's own folder: an interrupted study goes on as another run.
        ledger_path=folder.parent / "privacy" / f"{safe}.jsonl",
        personal_path=folder.parent / "personal" / safe,
        sites=len(parts),
    )


def _simulated_folder(run: str, name: str) -> tuple[Path, str]:
    """Where a simulated site keeps its files during a run, and its name as part of a file's."""
    from platformdirs import user_state_path

    folder = os.environ.get("FEDSIGMA_AUDIT") or user_state_path("fedsigma") / "audit"
    return Path(folder) / run, safe_name(name)
