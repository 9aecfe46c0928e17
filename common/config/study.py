"""Study files: the settings of a federated experiment.

Bounds stand beside the fields; rules between sections are in `rules`.
"""

from __future__ import annotations

import json
import os
from dataclasses import field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedsigma.common.config.federation import FederationConfig
from fedsigma.common.config.fields import Check, Line, ListOf, distinct, matching, one_of
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.rules import check_study
from fedsigma.common.config.schema import (
    ConfigError,
    build,
    did_you_mean,
    read_yaml,
    settings,
    to_plain,
    write_yaml,
)
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig
from fedsigma.common.config.training import LocalTrainingConfig

__all__ = ["BASELINES", "DataConfig", "StudyConfig", "load_study", "study_names"]

BASELINES = ("zero_shot", "local_only", "pooled")
PARTITIONERS = ("iid", "dirichlet", "pathological", "disjoint")
PATH_SOURCES = ("folder", "csv", "parquet", "dicom", "coop")
NAMED_SOURCES = ("coop",)
"""Of these, the sources whose path stands after a name."""


def _check_sites_by(value: str | dict[str, Any]) -> None:
    if isinstance(value, dict) and len(value) != 1:
        raise ValueError(f"which names {len(value)} partitioners, expected one")
    choices = PARTITIONERS if isinstance(value, dict) else ("site",)
    if (name := next(iter(value)) if isinstance(value, dict) else value) not in choices:
        raise ValueError(f"which is not known{did_you_mean(name, choices)}")


_PARTITIONER: dict[str, Any] = {"type": "object", "propertyNames": {"enum": list(PARTITIONERS)}}
_PARTITIONER |= {"minProperties": 1, "maxProperties": 1}


def _check_template(value: str) -> None:
    if value.count("{}") != 1 or "{" in value.replace("{}", ""):
        raise ValueError("expected one {} where the class name goes")


@settings
class DataConfig:
    """Where a simulation's images are, and how they are divided among its sites.

    A study for real sites has no such section: the images of a real site are named in its site.yaml.
    """

    section: ClassVar[str] = "data"

    def __hash__(self) -> int:  # the mappings have none
        return hash(json.dumps(to_plain(self), sort_keys=True))

    source: Line
    """Where the images are: kind:path, or demo."""
    sites_by: Annotated[
        str | dict[str, Any],
        Check(_check_sites_by, {"anyOf": [{"const": "site"}, _PARTITIONER]}),
    ] = "site"
    """site: by the column or folder of that name; or one partitioner (iid, dirichlet, pathological,
    disjoint) with its settings."""
    on_problem: Annotated[str, one_of(("stop", "skip"))] = "stop"
    """Whether a damaged image or unknown label stops the study or is skipped."""
    test_share: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    """Share of groups for testing, where the data have no split."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the source."""


@settings
class StudyConfig:
    """One federated experiment."""

    section: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {"judge": "evaluate_versions"}

    name: Annotated[
        str, matching("[A-Za-z0-9][A-Za-z0-9._-]{0,79}", "up to 80 letters, digits, '.', '_' and '-'")
    ]
    """Name of the study."""
    backbone: Line
    """Name of the CLIP that is adapted, as fedsigma inspect takes it."""
    classes: Annotated[ListOf[Line], Field(min_length=2), distinct]
    """Names of the classes, as they go into prompts."""
    template: Annotated[Line, Check(_check_template, {"pattern": "^[^{]*\\{\\}[^{]*$"})] = "a photo of a {}."
    """Prompt of a class, with {} where its name goes."""
    data: DataConfig | None = None
    """Images of a simulation."""
    shots: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Training images of each class at a site."""
    sigma: SigmaConfig = field(default_factory=SigmaConfig)
    """Which weights are adapted."""
    personal: PersonalConfig | None = None
    """Which of the adapted weights stay at their site; null: none."""
    training: LocalTrainingConfig = field(default_factory=LocalTrainingConfig)
    """Training at a site."""
    federation: FederationConfig = field(default_factory=FederationConfig)
    """How the sites work together."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Differential privacy."""
    baselines: Annotated[ListOf[Annotated[str, one_of(BASELINES)]], distinct] = ("zero_shot",)
    """Models to compare with: zero_shot, local_only, pooled (simulations only)."""
    evaluate_versions: ListOf[Line] = ()
    """Versions of models (NAME@N, or a path) that each site evaluates; nothing is trained."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1
    """Seed of sampling and training."""

    def __post_init__(self) -> None:
        check_study(
            baselines=self.baselines,
            evaluate_versions=self.evaluate_versions,
            has_data=self.data is not None,
            sigma=self.sigma,
            personal=self.personal,
            federation=self.federation,
            privacy=self.privacy,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompt of each class."""
        return tuple(self.template.format(name) for name in self.classes)

    @property
    def max_examples_per_site(self) -> int:
        """Return the most training images of a site: shots times classes."""
        return self.shots * len(self.classes)

    def replaced(self, *, rounds: int | None = None, seed: int | None = None) -> StudyConfig:
        """Return the study with another number of rounds or another seed; None keeps the study's own."""
        study = self
        if rounds is not None:
            study = replace(study, federation=replace(study.federation, rounds=rounds))
        return study if seed is None else replace(study, seed=seed)

    def to_yaml(self) -> str:
        """Write the study as YAML with all settings, also the defaults."""
        return write_yaml(self)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "the study") -> StudyConfig:
        """Read a study from YAML text.

        Raises:
            ConfigError: The text is not YAML, a key is unknown or missing, or a value is invalid.
        """
        return build(cls, read_yaml(text, where=where), where=where)


def study_names() -> list[str]:
    """Return the names of the bundled studies."""
    names = (file.name for file in (files("fedsigma.configs") / "studies").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_study(name_or_path: str | Path) -> StudyConfig:
    """Read a bundled study by its name, or a study file by its path.

    A relative path in `data.source` becomes absolute, because the sites of a simulation run in another
    working directory. It starts from the folder $FEDSIGMA_DATA if that is set, else from the study file's
    folder, or from the working directory for a bundled study.

    Raises:
        ConfigError: There is no such study, or it is invalid.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in study_names():
        text = (files("fedsigma.configs") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
        study, folder = StudyConfig.from_yaml(text, where=f"study '{name}'"), Path.cwd()
    elif path.is_file():
        study = StudyConfig.from_yaml(path.read_text(encoding="utf-8"), where=str(path))
        folder = path.resolve().parent
    else:
        raise ConfigError(f"no study or file named '{name}'{did_you_mean(name, study_names())}")
    if study.data is None:
        return study
    base = Path(os.environ.get("FEDSIGMA_DATA") or folder).expanduser().resolve()
    return replace(study, data=replace(study.data, source=_absolute(study.data.source, base)))


def _absolute(source: str, base: Path) -> str:
    kind, colon, rest = source.partition(":")
    if not colon or kind not in PATH_SOURCES:
        return source
    if kind in NAMED_SOURCES:
        name, colon, rest = rest.partition(":")
        return f"{kind}:{name}:{base / Path(rest).expanduser()}" if colon else source
    return f"{kind}:{base / Path(rest).expanduser()}"
