"""A study's settings: small dataclasses read from YAML and checked where they are built.

The errors of this module are read by people who have just edited a study file, so each names the key, the
value found, what was expected, and the next step.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from fedsigma.common.config.constants import (
    AUGMENTATIONS,
    CODECS,
    OPTIMISERS,
    PRECISIONS,
)
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.schema import (
    ConfigError,
    build,
    check_choice,
    check_number,
    check_printable,
    check_subset,
    did_you_mean,
    read_yaml,
    write_yaml,
)
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig
from fedsigma.common.config.training import TrainingConfig

__all__ = [
    "BASELINES",
    "STRATEGIES",
    "ConfigError",
    "DataConfig",
    "FederationConfig",
    "LocalTrainingConfig",
    "PersonalConfig",
    "PrivacyConfig",
    "SigmaConfig",
    "StudyConfig",
    "load_study",
    "study_names",
]

STRATEGIES = (
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "qfedavg",
)
MEANS = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi")
"""The strategies that need no more than the weighted mean."""
STEPS = {"fedavgm": "server_learning_rate", "fedadam": "eta", "fedyogi": "eta"}
"""The strategies that make steps of their own, and the option that says how large."""
BASELINES = ("zero_shot", "local_only", "pooled")
PATH_SOURCES = ("folder", "csv", "parquet", "dicom", "coop")
NAMED_SOURCES = ("coop",)
"""Of these, the sources whose path stands after a name."""

# --- the study ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where a simulation's images are and how they are divided among its sites.

    A real site says in its own site.yaml where its images are; a study for real sites has no such section.

    Fields: source, `kind:path` or `demo`; sites_by, `site` or one partitioner with its settings; on_problem,
    whether a corrupt image or unknown label stops the study or is skipped; test_share, the share of groups
    kept for testing where the data have no split of their own; options, passed on to the source.
    """

    section: ClassVar[str] = "data"

    source: str
    sites_by: str | dict[str, Any] = "site"
    on_problem: str = "stop"
    test_share: float = 0.5
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_printable("data.source", self.source)
        check_choice("data.on_problem", self.on_problem, ("stop", "skip"))
        check_number("data.test_share", self.test_share, low=0.05, high=0.95)
        if isinstance(self.sites_by, dict):
            if len(self.sites_by) != 1:
                raise ConfigError(f"data.sites_by names {len(self.sites_by)} partitioners, expected one")
            check_choice(
                "data.sites_by",
                next(iter(self.sites_by)),
                ("iid", "dirichlet", "pathological", "disjoint"),
            )
        else:
            check_choice("data.sites_by", self.sites_by, ("site",))


@dataclass(frozen=True, kw_only=True)
class LocalTrainingConfig(TrainingConfig):
    """The checked recipe of local training. Lengths are steps; local_steps are a site's in one round."""

    section: ClassVar[str] = "training"

    local_steps: int = 20

    def __post_init__(self) -> None:
        check_number("training.learning_rate", self.learning_rate, low=1e-9, high=10)
        check_choice("training.optimiser", self.optimiser, OPTIMISERS)
        check_number("training.batch_size", self.batch_size, low=1, high=65536)
        check_number("training.local_steps", self.local_steps, low=1, high=1_000_000)
        check_number("training.weight_decay", self.weight_decay, low=0, high=100)
        check_choice("training.schedule", self.schedule, ("cosine", "constant"))
        check_number("training.final_learning_rate", self.final_learning_rate, low=0, high=10)
        if self.schedule == "cosine" and self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"training.final_learning_rate is {self.final_learning_rate:g}, above training.learning_rate"
                f" ({self.learning_rate:g}): the schedule would rise; set it to the learning rate or below"
            )
        check_number("training.warmup_steps", self.warmup_steps, low=0, high=1_000_000)
        check_choice("training.augment", self.augment, AUGMENTATIONS)
        check_number("training.proximal", self.proximal, low=0, high=1e6)
        check_choice("training.precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """How the sites work together.

    Fields: strategy and its own options; schedule, how the strategy's own step (`STEPS`) goes on over the
    rounds; rounds; participation, the share of the ready sites that is asked in each round; cohorts, how they
    are drawn: `random`, or `by_images`, in proportion to their training images;
    min_sites, the fewest sites whose replies make a round count; round_timeout_s, how long one exchange may
    last; wait_for_sites_s, how long the server waits for min_sites to be there; evaluate_every, 1 to have
    each round's incoming shift evaluated at the sites, n for the first round and each n-th after it (the
    final shift is always evaluated); codec, how sites code what they send (one of `CODECS`); norm_bound, the
    largest L2 norm of a shift that is accepted (null: none); norm_factor, how many times the median length of
    a round's changes one may have, where three sites or more reply (null: any); masking, whether the server
    learns the sum of the changes only; mask_bound, the largest magnitude of a changed value that the sum has
    room for; max_examples, the most examples a site counts for (null: none).
    """

    section: ClassVar[str] = "federation"

    strategy: str = "fedavg"
    schedule: str = "constant"
    rounds: int = 10
    participation: float = 1.0
    cohorts: str = "random"
    min_sites: int = 2
    round_timeout_s: float = 600.0
    wait_for_sites_s: float = 300.0
    evaluate_every: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    codec: str = "exact"
    norm_bound: float | None = None
    norm_factor: float | None = 10.0
    masking: bool = False
    mask_bound: float = 16.0
    max_examples: int | None = None

    def __post_init__(self) -> None:
        check_choice("federation.strategy", self.strategy, STRATEGIES)
        check_choice("federation.schedule", self.schedule, ("cosine", "constant"))
        if self.schedule != "constant" and self.strategy not in STEPS:
            raise ConfigError(
                f"federation.schedule is '{self.schedule}', and {self.strategy} has no step of its own: use"
                f" one of {', '.join(STEPS)}, or schedule: constant"
            )
        check_choice("federation.codec", self.codec, CODECS)
        check_number("federation.rounds", self.rounds, low=1, high=100_000)
        check_number("federation.participation", self.participation, low=1e-6, high=1)
        check_choice("federation.cohorts", self.cohorts, ("random", "by_images"))
        if self.cohorts == "by_images" and (self.participation == 1 or self.masking):
            raise ConfigError(
                "federation.cohorts: by_images asks a share of the sites by how many images they tell:"
                " set participation below 1 and masking: false, or cohorts: random"
            )
        if self.cohorts == "by_images" and self.strategy not in MEANS:
            raise ConfigError(
                f"federation.cohorts: by_images weighs the sites' changes, and {self.strategy} takes no"
                f" weighted mean: use one of {', '.join(MEANS)}, or cohorts: random"
            )
        check_number("federation.min_sites", self.min_sites, low=1, high=100_000)
        check_number("federation.round_timeout_s", self.round_timeout_s, low=1, high=43_200)
        check_number("federation.wait_for_sites_s", self.wait_for_sites_s, low=0, high=604_800)
        check_number("federation.evaluate_every", self.evaluate_every, low=1, high=100_000)
        if self.norm_bound is not None:
            check_number("federation.norm_bound", self.norm_bound, low=1e-12)
        check_number("federation.mask_bound", self.mask_bound, low=1e-6, high=1e6)
        if self.masking and self.strategy not in MEANS:
            raise ConfigError(
                f"federation.masking: the server sees the sum only, and {self.strategy} needs each site's"
                f" change: use one of {', '.join(MEANS)}, or masking: false"
            )
        if self.norm_factor is not None:
            check_number("federation.norm_factor", self.norm_factor, low=1)
        if self.max_examples is not None:
            check_number("federation.max_examples", self.max_examples, low=1)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One federated experiment, as its study file says it.

    evaluate_versions: versions of models (NAME@N, or a path) that every site evaluates; nothing is trained
    then.
    """

    section: ClassVar[str] = ""

    name: str
    backbone: str
    classes: tuple[str, ...]
    template: str = "a photo of a {}."
    data: DataConfig | None = None
    shots: int = 16
    sigma: SigmaConfig = field(default_factory=SigmaConfig)
    personal: PersonalConfig | None = None
    training: LocalTrainingConfig = field(default_factory=LocalTrainingConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    baselines: tuple[str, ...] = ("zero_shot",)
    evaluate_versions: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", self.name):
            raise ConfigError(f"name is '{self.name}', expected up to 80 letters, digits, '.', '_' and '-'")
        check_printable("backbone", self.backbone)
        check_printable("template", self.template)
        for name in self.classes:
            check_printable("classes", name)
        if len(self.classes) < 2:
            raise ConfigError(f"classes is {list(self.classes)}, expected at least two names")
        if len(set(self.classes)) != len(self.classes):
            raise ConfigError(f"classes names something twice: {list(self.classes)}")
        if self.template.count("{}") != 1 or "{" in self.template.replace("{}", ""):
            raise ConfigError(f"template is '{self.template}', expected one {{}} where the class name goes")
        check_number("shots", self.shots, low=1, high=100_000)
        check_number("seed", self.seed, low=0, high=2**31 - 1)
        check_subset("baselines", self.baselines, BASELINES, empty=True)
        self._check_evaluate_versions()
        self._check_privacy()
        if self.personal is not None:
            self._check_personal(self.personal)
        if "pooled" in self.baselines and self.data is None:
            raise ConfigError(
                "baselines asks for 'pooled', but the study has no data section: pooling needs all images in"
                " one place, which only a simulation has; leave 'pooled' out"
            )

    def _check_evaluate_versions(self) -> None:
        for reference in self.evaluate_versions:
            check_printable("evaluate_versions", reference)
        if self.evaluate_versions and self.personal is not None:
            raise ConfigError(
                "evaluate_versions evaluates shared values, and the study has others: leave personal out"
            )
        if self.evaluate_versions and (other := sorted(set(self.baselines) - {"zero_shot"})):
            raise ConfigError(
                f"evaluate_versions trains nothing, and baselines asks for '{other[0]}': leave it out"
            )

    def _check_personal(self, own: PersonalConfig) -> None:
        """Check what needs no backbone; `ParameterPartition` checks the number of layers."""
        if "local_only" in self.baselines:
            raise ConfigError(
                "baselines asks for 'local_only', which would send each site's personal values to the others:"
                " run the same study without its section personal to compare"
            )
        if set(own.towers).isdisjoint(self.sigma.towers) or set(own.parts).isdisjoint(self.sigma.parts):
            raise ConfigError(
                f"personal is {own}, which is nothing of what sigma adapts, {self.sigma}: choose some of"
                " that, or leave personal out"
            )
        covers = set(own.towers) >= set(self.sigma.towers) and set(own.parts) >= set(self.sigma.parts)
        if covers and own.layers in ("all", self.sigma.layers):
            raise ConfigError(
                f"personal is {own}, which is all that sigma adapts, {self.sigma}, so nothing would be"
                " shared: choose less of it"
            )

    def _check_privacy(self) -> None:
        level, strategy = self.privacy.level, self.federation.strategy
        if "local_only" in self.baselines and (self.federation.masking or self.privacy.of_sites):
            why = "federation.masking" if self.federation.masking else "privacy.level 'site'"
            raise ConfigError(
                "baselines asks for 'local_only', which would show each site's own change to the server and"
                f" the other sites, and {why} is to hide it: leave it out, or run the same study without"
            )
        if self.privacy.in_training and strategy == "qfedavg":
            raise ConfigError(
                f"privacy.level is '{level}', which keeps the sites' losses untold, and qfedavg needs them:"
                " use another federation.strategy"
            )
        if self.privacy.of_sites and strategy not in MEANS:
            raise ConfigError(
                f"privacy.level is 'site', whose noise is reckoned for a mean, and {strategy} takes none: use"
                f" one of {', '.join(MEANS)}"
            )
        if self.privacy.of_sites and self.federation.cohorts == "by_images":
            raise ConfigError(
                "privacy.level is 'site', for which each site counts alike, and federation.cohorts: by_images"
                " asks large ones more often: use cohorts: random"
            )
        if self.privacy.of_sites and self.federation.masking:
            privacy, federation = self.privacy, self.federation
            # Eight standard deviations of a site's share of the noise: none of a million values is above.
            share = privacy.noise_multiplier / math.sqrt(federation.min_sites)
            needed = privacy.clip_norm * (1 + 8 * share)
            if needed > federation.mask_bound:
                raise ConfigError(
                    f"federation.mask_bound is {federation.mask_bound:g}, and noise that hides sites needs"
                    f" room up to {needed:.4g}: set it to that, or take a smaller privacy.clip_norm"
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


# --- finding ------------------------------------------------------------------------------------------


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
