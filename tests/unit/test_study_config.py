"""The study file: what it accepts, what it refuses, and in which words."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.config.federation import STRATEGIES, FederationConfig
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import BASELINES, DataConfig, StudyConfig, load_study, study_names
from fedsigma.common.config.training import LocalTrainingConfig

SMALL = """
name: small
backbone: starter
classes: [a, b]
"""


def test_bundled_studies_all_load() -> None:
    ours = {"demo", "white-cells-four-labs", "dermoscopy-four-sites", "white-cells-unlike-sites"}
    assert ours <= set(study_names())
    for name in study_names():
        assert load_study(name).name == name


def test_defaults_are_the_documented_recipe() -> None:
    study = StudyConfig.from_yaml(SMALL)
    assert study.prompts == ("a photo of a a.", "a photo of a b.")
    assert study.data is None and study.shots == 16
    assert study.training == LocalTrainingConfig() and study.federation == FederationConfig()
    assert study.max_examples_per_site == 32


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("baseline: [zero_shot]", "the key 'baseline' is not known: did you mean 'baselines'?"),
        ("training: {learningrate: 1}", "'training.learningrate' is not known: did you mean"),
        ("federation: {zzz: 1}", "'federation.zzz' is not known: known are strategy"),
        ("federation: {strategy: fedavgg}", "'fedavgg', which is not known: did you mean 'fedavg"),
        ("shots: 0", "shots is 0, expected a number between 1 and"),
        ("shots: 1.5", "shots is 1.5, expected a whole number"),
        ("shots: true", "shots is True, expected a whole number"),
        ("training: {learning_rate: .nan}", "training.learning_rate is nan"),
        ("training: {augment: strong}", "training.augment is 'strong'"),
        ("training: {optimiser: adam}", "training.optimiser is 'adam'"),
        (
            "training: {learning_rate: 1.0e-7}",
            "final_learning_rate is 1e-06, above training.learning_rate (1e-07)",
        ),
        ("federation: {schedule: cosine}", "and fedavg has no step of its own: use one of fedavgm"),
        ("template: a photo", "expected one {} where the class name goes"),
        ("template: 'a {x} of {}'", "expected one {} where the class name goes"),
        ("baselines: [pooled]", "only a simulation has"),
        ("baselines: [zero_shot, zero_shot]", "names something twice"),
        ("data: {sites_by: site}", "'data.source' is missing"),
        ("data: {source: demo, sites_by: {iid: {}, dirichlet: {}}}", "names 2 partitioners"),
        ("data: {source: demo, sites_by: {dirichlett: {}}}", "did you mean 'dirichlet'?"),
        ("sigma: {layers: [-1]}", "layer numbers from 0"),
        ("sigma: {layers: first}", "sigma.layers is 'first'"),
        ("sigma: {parts: []}", "sigma.parts is empty"),
        ("federation: 3", "federation is 3, expected keys and values"),
        ("seed: 1\nseed: 2", "'seed' is written twice"),
        ("shots: [", "cannot be read"),
    ],
)
def test_refusals_name_the_value_and_the_next_step(extra: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.from_yaml(SMALL + extra, where="small.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("small.yaml")


def test_a_class_named_no_must_be_quoted() -> None:
    with pytest.raises(ConfigError, match="put it in quotes"):
        StudyConfig.from_yaml("name: x\nbackbone: starter\nclasses: [yes, no]")
    quoted = StudyConfig.from_yaml("name: x\nbackbone: starter\nclasses: ['yes', 'no']")
    assert quoted.classes == ("yes", "no")


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'backbone', 'classes' is missing"):
        StudyConfig.from_yaml("name: x")


def test_a_file_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds list"):
        StudyConfig.from_yaml("- 1")


def test_exponents_without_a_dot_are_numbers() -> None:
    study = StudyConfig.from_yaml(SMALL + "training: {learning_rate: 1e-3}")
    assert study.training.learning_rate == 0.001


@pytest.mark.parametrize("name", ["6e90", "6e9b", "1e3"])
def test_a_name_that_looks_like_a_number_survives(name: str) -> None:
    study = StudyConfig.from_yaml(SMALL.replace("small", f"'{name}'"))
    assert StudyConfig.from_yaml(study.to_yaml()).name == name


def test_unknown_study_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_study("demoo")


def test_relative_data_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SMALL + "data: {source: 'parquet:cells.parquet'}")
    monkeypatch.delenv("FEDSIGMA_DATA", raising=False)
    beside = load_study(file).data
    assert beside is not None and beside.source == f"parquet:{tmp_path / 'cells.parquet'}"
    monkeypatch.setenv("FEDSIGMA_DATA", str(tmp_path / "store"))
    stored = load_study(str(file)).data
    assert stored is not None and stored.source == f"parquet:{tmp_path / 'store' / 'cells.parquet'}"


names = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()) and text.isprintable())
numbers = st.floats(min_value=1e-6, max_value=9, allow_nan=False)
studies = st.builds(
    StudyConfig,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    backbone=names,
    classes=st.lists(names, min_size=2, max_size=5, unique=True).map(tuple),
    template=st.just("a slide of {} cells"),
    data=st.builds(
        DataConfig,
        source=names,
        sites_by=st.sampled_from(["site", {"iid": {"sites": 4}}, {"dirichlet": {"alpha": 0.1, "sites": 10}}]),
        test_share=st.floats(min_value=0.05, max_value=0.95),
        options=st.dictionaries(names, st.one_of(st.integers(), st.booleans(), names), max_size=2),
    ),
    shots=st.integers(1, 99),
    sigma=st.builds(
        SigmaConfig,
        layers=st.one_of(st.just("top"), st.lists(st.integers(0, 11), min_size=1, unique=True).map(tuple)),
    ),
    training=st.builds(
        LocalTrainingConfig,
        learning_rate=numbers,
        weight_decay=numbers,
        proximal=numbers,
        optimiser=st.sampled_from(("adamw", "sgd")),
    ),
    federation=st.builds(
        FederationConfig,
        strategy=st.sampled_from(STRATEGIES),
        norm_bound=st.one_of(st.none(), numbers),
        options=st.dictionaries(names, numbers, max_size=2),
    ),
    baselines=st.lists(st.sampled_from(BASELINES), unique=True).map(tuple),
    seed=st.integers(0, 2**31 - 1),
)


@settings(deadline=None)
@given(studies)
def test_writing_and_reading_gives_the_same_study(study: StudyConfig) -> None:
    assert StudyConfig.from_yaml(study.to_yaml()) == study


@given(st.text())
def test_any_text_is_parsed_or_refused_with_the_reason(text: str) -> None:
    with contextlib.suppress(ConfigError):
        StudyConfig.from_yaml(text)
