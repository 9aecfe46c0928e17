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

    name: Annotated[Line, Check(_check_name, {"maxLength": 80, "not": {"const": ALL_SITES}})]
    """Name of the site, as the server knows it."""
    source: Line
    """Where the images are: folder:PATH, csv:PATH, parquet:PATH or dicom:PATH."""
    studies: ListOf[str]
    """Names of the studies that may run here; '*': any."""
    backbones: dict[str, Annotated[str, Field(min_length=1)]] = field(
        default_factory=lambda: {"starter": "starter"}
    )
    """Allowed backbones: the study's name of each, and where it is stored here."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the source."""
    on_problem: Annotated[str, one_of(("stop", "skip"))] = "stop"
    """Whether a damaged image or unknown label stops the site's work or is skipped."""
    test_share: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    """Share of groups for testing, where the data have no split."""
    max_local_steps: Annotated[int, Field(ge=1)] = 1000
    """Most steps of one training task."""
    max_examples: Annotated[int, Field(ge=1)] = 10_000
    """Most training images that are used."""
    max_rounds: Annotated[int, Field(ge=1)] = 1000
    """Most rounds of a study."""
    max_evaluations: Annotated[int, Field(ge=1)] = 10_000
    """Most models of a study, over all its runs, evaluated on the test images."""
    min_cohort: Annotated[int, Field(ge=1)] = 2
    """Fewest sites whose updates must be averaged together; 2 or more also refuses to train alone."""
    share_class_counts: bool = False
    """Whether the server learns the number of training images of each class."""
    share_confusion: bool = False
    """Whether the server learns the final models' confusion matrices, which count the test images of each
    class."""
    allow_attribution: bool = False
    """Whether finished models name this site."""
    allow_explanation: bool = False
    """Whether the server may describe in words what this site's last update changed."""
    audit: str = "audit.jsonl"
    """File of the audit log."""
    identity: str = ""
    """File of the site's Ed25519 private key (PEM), for secure aggregation."""
    peers: dict[str, Sha256] = field(default_factory=dict)
    """Public key of each site of the study (64 hex digits), for secure aggregation: from the study's list,
    never from the server."""
    require_masking: bool = False
    """Whether a round without secure aggregation is refused."""
    max_cohorts: Annotated[int, Field(ge=1)] = 2
    """Number of cohorts that one masked round is answered for."""
    privacy: Annotated[str, one_of(PRIVACY_LEVELS[:3])] = "none"
    """What training must hide at least: none, image or group."""
    epsilon: Annotated[float | None, Field(ge=1e-3)] = None
    """Privacy budget of all studies together; null: each study's own only."""
    delta: Annotated[float, Field(ge=1e-15, le=0.1)] = 1e-5
    """Delta at which epsilon is counted."""
    ledger: str = "privacy.jsonl"
    """File of the privacy ledger."""
    personal: str = "personal"
    """Folder of the values that studies leave at the site."""
    bundles: ListOf[Sha256] = ()
    """SHA-256 of each app bundle that may run here."""
    cpus: Annotated[int | None, Field(ge=1)] = None
    """Processors for training; null: all."""
    gpus: Annotated[str, matching("auto|none|[0-9]+(,[0-9]+)*", 'auto, none, or numbers such as "0,1"')] = (
        "auto"
    )
    """GPUs for training: auto, none, or numbers such as "0,1"."""

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
