"""Settings of a site, as its site.yaml has them."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedsigma.common.config.constants import ALL_SITES, PRIVACY_LEVELS
from fedsigma.common.config.fields import Check, Line, ListOf, Sha256, matching, one_of
from fedsigma.common.config.schema import ConfigError, build, read_yaml, settings

__all__ = ["SitePolicy"]


def _check_name(name: str) -> None:
    if len(name) > 80 or name == ALL_SITES:
        raise ValueError(f"expected at most 80 characters and not '{ALL_SITES}'")


@settings
class SitePolicy:
    """What a site allows; nothing that the server sends can widen it."""

    section: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {
        "tell_confusion": "share_confusion",
        "tell_class_counts": "share_class_counts",
        "named_in_models": "allow_attribution",
        "explained": "allow_explanation",
        "max_judged": "max_evaluations",
    }

    name: Annotated[
        Line,
        Check(_check_name, {"maxLength": 80, "not": {"const": ALL_SITES}}),
        Field(description="Name of the site, as the server knows it."),
    ]
    source: Annotated[
        Line, Field(description="Where the images are: folder:PATH, csv:PATH, parquet:PATH or dicom:PATH.")
    ]
    studies: Annotated[ListOf[str], Field(description="Names of the studies that may run here; '*': any.")]
    backbones: Annotated[
        dict[str, Annotated[str, Field(min_length=1)]],
        Field(description="Allowed backbones: the study's name of each, and where it is stored here."),
    ] = field(default_factory=lambda: {"starter": "starter"})
    options: Annotated[dict[str, Any], Field(description="Options of the source.")] = field(
        default_factory=dict
    )
    on_problem: Annotated[
        str,
        one_of(("stop", "skip")),
        Field(description="Whether a damaged image or unknown label stops the site's work or is skipped."),
    ] = "stop"
    test_share: Annotated[
        float,
        Field(ge=0.05, le=0.95, description="Share of groups for testing, where the data have no split."),
    ] = 0.5
    max_local_steps: Annotated[int, Field(ge=1, description="Most steps of one training task.")] = 1000
    max_examples: Annotated[int, Field(ge=1, description="Most training images that are used.")] = 10_000
    max_rounds: Annotated[int, Field(ge=1, description="Most rounds of a study.")] = 1000
    max_evaluations: Annotated[
        int,
        Field(ge=1, description="Most models of a study, over all its runs, evaluated on the test images."),
    ] = 10_000
    min_cohort: Annotated[
        int,
        Field(
            ge=1,
            description="Fewest sites whose updates must be averaged together; 2 or more also refuses"
            " to train alone.",
        ),
    ] = 2
    share_class_counts: Annotated[
        bool, Field(description="Whether the server learns the number of training images of each class.")
    ] = False
    share_confusion: Annotated[
        bool,
        Field(
            description="Whether the server learns the final models' confusion matrices, which count the test"
            " images of each class."
        ),
    ] = False
    allow_attribution: Annotated[bool, Field(description="Whether finished models name this site.")] = False
    allow_explanation: Annotated[
        bool,
        Field(description="Whether the server may describe in words what this site's last update changed."),
    ] = False
    audit: Annotated[str, Field(description="File of the audit log.")] = "audit.jsonl"
    identity: Annotated[
        str, Field(description="File of the site's Ed25519 private key (PEM), for secure aggregation.")
    ] = ""
    peers: Annotated[
        dict[str, Sha256],
        Field(
            description="Public key of each site of the study (64 hex digits), for secure aggregation: from"
            " the study's list, never from the server."
        ),
    ] = field(default_factory=dict)
    require_masking: Annotated[
        bool, Field(description="Whether a round without secure aggregation is refused.")
    ] = False
    max_cohorts: Annotated[
        int, Field(ge=1, description="Number of cohorts that one masked round is answered for.")
    ] = 2
    privacy: Annotated[
        str,
        one_of(PRIVACY_LEVELS[:3]),
        Field(description="What training must hide at least: none, image or group."),
    ] = "none"
    epsilon: Annotated[
        float | None,
        Field(ge=1e-3, description="Privacy budget of all studies together; null: each study's own only."),
    ] = None
    delta: Annotated[float, Field(ge=1e-15, le=0.1, description="Delta at which epsilon is counted.")] = 1e-5
    ledger: Annotated[str, Field(description="File of the privacy ledger.")] = "privacy.jsonl"
    personal: Annotated[str, Field(description="Folder of the values that studies leave at the site.")] = (
        "personal"
    )
    bundles: Annotated[
        ListOf[Sha256], Field(description="SHA-256 of each app bundle that may run here.")
    ] = ()
    cpus: Annotated[int | None, Field(ge=1, description="Processors for training; null: all.")] = None
    gpus: Annotated[
        str,
        matching("auto|none|[0-9]+(,[0-9]+)*", 'auto, none, or numbers such as "0,1"'),
        Field(description='GPUs for training: auto, none, or numbers such as "0,1".'),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.privacy == "none":
            raise ConfigError(
                f"epsilon is {self.epsilon:g}, and privacy 'none' allows studies that spend without bound:"
                " set privacy to image or group"
            )

    @classmethod
    def read(cls, path: Path) -> SitePolicy:
        """Read a site.yaml.

        Raises:
            ConfigError: It cannot be read, a key is unknown or missing, or a value is invalid.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return build(cls, read_yaml(text, where=str(path)), where=str(path))
