"""A site's own rules: what its site.yaml says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedsigma.common.config.constants import PRIVACY_LEVELS
from fedsigma.common.config.schema import (
    ConfigError,
    build,
    check_choice,
    check_number,
    check_printable,
    read_yaml,
)

__all__ = ["SitePolicy"]


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What site.yaml says.

    Fields: name, as the server sees it; source, the site's images, and options for it; on_problem, whether a
    damaged image or unknown label stops the site's work or is skipped; studies that may be
    run here (`*`: any); backbones, the study's name of each allowed backbone and where it lies here;
    max_local_steps of one task; max_examples, the most training images used; max_rounds of a study;
    max_evaluations, how many models of a study are judged here on the test images, over all its runs;
    min_cohort, the fewest sites whose shifts must be averaged together (2 or more also refuses training
    alone); share_class_counts, whether the number of training images of each class may be told;
    share_confusion, whether the final models' confusion matrices may be, which count the test images of each
    class; allow_attribution, whether finished models name this site; allow_explanation, whether the server
    may say in words what this site's own last shift changed; audit, the audit log's file.

    For masked sums: identity, the file of the site's Ed25519 private key (PEM); peers, the public key of each
    site of the study (64 hex digits), copied from the study's list and never from the server;
    require_masking, whether an unmasked round is refused; max_cohorts, for how many cohorts one round is
    answered.

    For differential privacy: privacy, what training must hide at least (`none`, `image` or `group`); epsilon,
    the budget of all studies together (null: each study's own only), counted at delta; ledger, the file that
    says what has been spent.

    personal: the folder of the values that studies leave at the site.

    For a site of its own (`fedsigma site up`): bundles, the SHA-256 of each app bundle that may run here;
    cpus, processors for training (null: all); gpus, `auto`, `none` or their numbers.
    """

    section: ClassVar[str] = ""

    name: str
    source: str
    studies: tuple[str, ...]
    backbones: dict[str, str] = field(default_factory=lambda: {"starter": "starter"})
    options: dict[str, Any] = field(default_factory=dict)
    on_problem: str = "stop"
    test_share: float = 0.5
    max_local_steps: int = 1000
    max_examples: int = 10_000
    max_rounds: int = 1000
    max_evaluations: int = 10_000
    min_cohort: int = 2
    share_class_counts: bool = False
    share_confusion: bool = False
    allow_attribution: bool = False
    allow_explanation: bool = False
    audit: str = "audit.jsonl"
    identity: str = ""
    peers: dict[str, str] = field(default_factory=dict)
    require_masking: bool = False
    max_cohorts: int = 2
    privacy: str = "none"
    epsilon: float | None = None
    delta: float = 1e-5
    ledger: str = "privacy.jsonl"
    personal: str = "personal"
    bundles: tuple[str, ...] = ()
    cpus: int | None = None
    gpus: str = "auto"

    def __post_init__(self) -> None:
        check_printable("name", self.name)
        check_printable("source", self.source)
        check_choice("on_problem", self.on_problem, ("stop", "skip"))
        check_number("test_share", self.test_share, low=0.05, high=0.95)
        check_number("max_local_steps", self.max_local_steps, low=1)
        check_number("max_examples", self.max_examples, low=1)
        check_number("max_rounds", self.max_rounds, low=1)
        check_number("max_evaluations", self.max_evaluations, low=1)
        if self.cpus is not None:
            check_number("cpus", self.cpus, low=1)
        if not re.fullmatch(r"auto|none|[0-9]+(,[0-9]+)*", self.gpus):
            raise ConfigError(f"gpus is '{self.gpus}', expected auto, none, or numbers such as \"0,1\"")
        for digest in self.bundles:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ConfigError(
                    f"bundles has '{digest}', expected the SHA-256 of an app bundle, 64 hex digits"
                )
        check_number("min_cohort", self.min_cohort, low=1)
        check_number("max_cohorts", self.max_cohorts, low=1)
        check_choice("privacy", self.privacy, PRIVACY_LEVELS[:3])
        check_number("delta", self.delta, low=1e-15, high=0.1)
        if self.epsilon is not None:
            check_number("epsilon", self.epsilon, low=1e-3)
            if self.privacy == "none":
                raise ConfigError(
                    f"epsilon is {self.epsilon:g}, and privacy 'none' lets studies train that spend without"
                    " bound: set privacy to image or group"
                )
        for name, key in self.peers.items():
            if not re.fullmatch("[0-9a-f]{64}", str(key)):
                raise ConfigError(f"peers says '{name}' is {key!r}, expected 64 hex digits")
        if len(self.name) > 80 or self.name == "pooled":
            raise ConfigError(f"name is '{self.name}', expected at most 80 characters and not 'pooled'")
        for name, place in self.backbones.items():
            if not isinstance(place, str) or not place:
                raise ConfigError(f"backbones says '{name}' is {place!r}, expected a backbone's name")

    @classmethod
    def read(cls, path: Path) -> SitePolicy:
        """Read a site.yaml.

        Raises:
            ConfigError: it cannot be read, a key is unknown or missing, or a value is not allowed.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return build(cls, read_yaml(text, where=str(path)), where=str(path))
