"""Study files: the settings of a federated experiment.

The errors are read by people who have just edited a study file, so each names the key, the value, what was
expected, and the next step. Bounds stand beside the fields; rules between sections are in `rules`.
"""

from __future__ import annotations

import json
import os
from dataclasses import field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedsigma.common.config import rules
from fedsigma.common.config.federation import FederationConfig
from fedsigma.common.config.fields import Check, Line, ListOf, distinct, matching, one_of
from fedsigma.common.config.privacy import PrivacyConfig
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
    known = PARTITIONERS if isinstance(value, dict) else ("site",)
    if (name := next(iter(value)) if isinstance(value, dict) else value) not in known:
        raise ValueError(f"which is not known{did_you_mean(name, known)}")


def _check_template(value: str) -> None:
    if value.count("{}") != 1 or "{" in value.replace("{}", ""):
        raise ValueError("expected one {} where the class name goes")


@settings
class DataConfig:
    """Where a simulation's images are, and how they are divided among its sites.

    A study for real sites has no such section: the images of a real site are named in its site.yaml.
    """

    section: ClassVar[str] = "data"

    def __hash__(self) -> int:
        # Its tables have no hash of their own.
        return hash(json.dumps(to_plain(self), sort_keys=True))

    source: Annotated[Line, Field(description="Where the images are: kind:path, or demo.")]
    sites_by: Annotated[
        str | dict[str, Any],
        Check(
            _check_sites_by,
            {
                "anyOf": [
                    {"const": "site"},
                    {
                        "type": "object",
                        "propertyNames": {"enum": list(PARTITIONERS)},
                        "minProperties": 1,
                        "maxProperties": 1,
                    },
                ]
            },
        ),
        Field(
            description="site: by the column or folder of that name; or one partitioner (iid, dirichlet,"
            " pathological, disjoint) with its settings."
        ),
    ] = "site"
    on_problem: Annotated[
        str,
        one_of(("stop", "skip")),
        Field(description="Whether a damaged image or unknown label stops the study or is skipped."),
    ] = "stop"
    test_share: Annotated[
        float,
        Field(ge=0.05, le=0.95, description="Share of groups for testing, where the data have no split."),
    ] = 0.5
    options: Annotated[dict[str, Any], Field(description="Options of the source.")] = field(
        default_factory=dict
    )


@settings
class StudyConfig:
    """One federated experiment."""

    section: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {"judge": "evaluate_versions"}

    name: Annotated[
        str,
        matching("[A-Za-z0-9][A-Za-z0-9._-]{0,79}", "up to 80 letters, digits, '.', '_' and '-'"),
        Field(description="Name of the study."),
    ]
    backbone: Annotated[
        Line, Field(description="Name of the CLIP that is adapted, as fedsigma inspect takes it.")
    ]
    classes: Annotated[
        ListOf[Line],
        Field(min_length=2, description="Names of the classes, as they go into prompts."),
        distinct,
    ]
    template: Annotated[
        Line,
        Check(_check_template, {"pattern": "^[^{]*\\{\\}[^{]*$"}),
        Field(description="Prompt of a class, with {} where its name goes."),
    ] = "a photo of a {}."
    data: Annotated[DataConfig | None, Field(description="Images of a simulation.")] = None
    shots: Annotated[int, Field(ge=1, le=100_000, description="Training images of each class at a site.")] = (
        16
    )
    sigma: Annotated[SigmaConfig, Field(description="Which weights are adapted.")] = field(
        default_factory=SigmaConfig
    )
    personal: Annotated[
        PersonalConfig | None,
        Field(description="Which of the adapted weights stay at their site; null: none."),
    ] = None
    training: Annotated[LocalTrainingConfig, Field(description="Training at a site.")] = field(
        default_factory=LocalTrainingConfig
    )
    federation: Annotated[FederationConfig, Field(description="How the sites work together.")] = field(
        default_factory=FederationConfig
    )
    privacy: Annotated[PrivacyConfig, Field(description="Differential privacy.")] = field(
        default_factory=PrivacyConfig
    )
    baselines: Annotated[
        ListOf[Annotated[str, one_of(BASELINES)]],
        Field(description="Models to compare with: zero_shot, local_only, pooled (simulations only)."),
        distinct,
    ] = ("zero_shot",)
    evaluate_versions: Annotated[
        ListOf[Line],
        Field(
            description="Versions of models (NAME@N, or a path) that each site evaluates; nothing is trained."
        ),
    ] = ()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of sampling and training.")] = 1

    def __post_init__(self) -> None:
        rules.check_evaluate_versions(
            self.evaluate_versions, personal=self.personal, baselines=self.baselines
        )
        rules.check_personal(self.personal, self.sigma)
        rules.check_privacy(self.privacy, self.federation)
        rules.check_baselines(
            self.baselines,
            has_data=self.data is not None,
            personal=self.personal,
            federation=self.federation,
            privacy=self.privacy,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The template filled with each class name, in the order of the classes."""
        return tuple(self.template.format(name) for name in self.classes)

    @property
    def max_examples_per_site(self) -> int:
        """The most training images a site can have in this study: shots times classes."""
        return self.shots * len(self.classes)

    def replaced(self, *, rounds: int | None = None, seed: int | None = None) -> StudyConfig:
        """Return the study with another number of rounds or another seed; None keeps the study's own."""
        study = self
        if rounds is not None:
            study = replace(study, federation=replace(study.federation, rounds=rounds))
        return study if seed is None else replace(study, seed=seed)

    def to_yaml(self) -> str:
        """Write the study with every setting spelled out; `StudyConfig.from_yaml` reads it back equal."""
        return write_yaml(self)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "the study") -> StudyConfig:
        """Read a study from YAML text.

        Raises:
            ConfigError: it is not YAML, a key is unknown or missing, or a value is not allowed.
        """
        return build(cls, read_yaml(text, where=where), where=where)


def study_names() -> list[str]:
    """Return the names of the studies that come with FedSigma."""
    folder = files("fedsigma.configs") / "studies"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_study(name_or_path: str | Path) -> StudyConfig:
    """Read a study by the name of one that comes with FedSigma, or by the path of a YAML file.

    A relative path in `data.source` is looked for under the folder $FEDSIGMA_DATA if that is set, else beside
    the study file, else (for a study that comes with FedSigma) in the working directory; the returned study
    holds the absolute path, since sites of a simulation run in another working directory.

    Raises:
        ConfigError: there is no such study, or it does not read.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in study_names():
        text = (files("fedsigma.configs") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
        study, beside = StudyConfig.from_yaml(text, where=f"study '{name}'"), Path.cwd()
    elif path.is_file():
        study = StudyConfig.from_yaml(path.read_text(encoding="utf-8"), where=str(path))
        beside = path.resolve().parent
    else:
        raise ConfigError(f"no study or file named '{name}'{did_you_mean(name, study_names())}")
    if study.data is None:
        return study
    base = Path(os.environ.get("FEDSIGMA_DATA") or beside).expanduser().resolve()
    return replace(study, data=replace(study.data, source=_absolute(study.data.source, base)))


def _absolute(source: str, base: Path) -> str:
    kind, colon, rest = source.partition(":")
    if not colon or kind not in PATH_SOURCES:
        return source
    if kind in NAMED_SOURCES:
        name, colon, rest = rest.partition(":")
        return f"{kind}:{name}:{base / Path(rest).expanduser()}" if colon else source
    return f"{kind}:{base / Path(rest).expanduser()}"
