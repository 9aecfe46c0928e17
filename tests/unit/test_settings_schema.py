"""The JSON Schemas of study.yaml and site.yaml, and settings written as YAML and read again."""

import json
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.deployment.home import SITE_YAML
from fedsigma.client.site.policy import SitePolicy
from fedsigma.common.config.constants import ALL_SITES, CODECS, OPTIMISERS, PARTS, PRIVACY_LEVELS, TOWERS
from fedsigma.common.config.federation import STRATEGIES, FederationConfig
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.schema import ConfigError, build, read_yaml, write_yaml
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig
from fedsigma.common.config.study import BASELINES, DataConfig, StudyConfig, load_study, study_names
from fedsigma.common.config.training import LocalTrainingConfig

SITE = {"name": "north", "source": "folder:/data", "studies": ["*"]}
STUDY = {"name": "small", "backbone": "starter", "classes": ["a", "b"]}
DIGEST = "0123456789abcdef" * 4


def schema(command: str) -> dict[str, Any]:
    printed = CliRunner().invoke(main, [command, "schema"])
    assert printed.exit_code == 0, printed.output
    content: dict[str, Any] = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(content)
    return content


@pytest.fixture(scope="module", params=["study", "site"])
def printed_schema(request: pytest.FixtureRequest) -> dict[str, Any]:
    return schema(request.param)


def test_bundled_studies_are_valid() -> None:
    validator = jsonschema.Draft202012Validator(schema("study"))
    for name in study_names():
        validator.validate(yaml.safe_load(load_study(name).to_yaml()))


def test_the_site_yaml_of_a_new_site_is_valid() -> None:
    jsonschema.Draft202012Validator(schema("site")).validate(yaml.safe_load(SITE_YAML.format(name="north")))


def test_each_setting_has_a_description(printed_schema: dict[str, Any]) -> None:
    for part in (printed_schema, *printed_schema.get("$defs", {}).values()):
        for name, values in part["properties"].items():
            assert values.get("description"), name
        assert part["additionalProperties"] is False


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("study", {"baseline": []}),
        ("study", {"shots": 0}),
        ("study", {"shots": "16"}),
        ("study", {"classes": ["a"]}),
        ("study", {"classes": ["a", "a"]}),
        ("study", {"template": "a photo"}),
        ("study", {"federation": {"strategy": "fedavgg"}}),
        ("study", {"federation": {"round": 3}}),
        ("study", {"sigma": {"layers": [-1]}}),
        ("study", {"data": {"source": "demo", "sites_by": {"iid": {}, "dirichlet": {}}}}),
        ("study", {"training": {"augment": "strong"}}),
        ("site", {"max_steps": 1}),
        ("site", {"min_cohort": 0}),
        ("site", {"privacy": "site"}),
        ("site", {"name": ALL_SITES}),
        ("site", {"peers": {"south": "abc"}}),
        ("site", {"gpus": "all"}),
    ],
)
def test_the_schema_refuses_what_the_settings_refuse(command: str, change: dict[str, Any]) -> None:
    values = (STUDY if command == "study" else SITE) | change
    validator = jsonschema.Draft202012Validator(schema(command))
    assert not validator.is_valid(values)
    with pytest.raises(ConfigError):
        build(StudyConfig if command == "study" else SitePolicy, values, where="file")


@pytest.mark.parametrize(
    ("cls", "values", "old", "new"),
    [
        (StudyConfig, STUDY, "judge", "evaluate_versions"),
        (SitePolicy, SITE, "tell_confusion", "share_confusion"),
        (SitePolicy, SITE, "named_in_models", "allow_attribution"),
        (SitePolicy, SITE, "max_judged", "max_evaluations"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(
    cls: type, values: dict[str, Any], old: str, new: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{old}' is now called '{new}'"):
        build(cls, values | {old: 1}, where="file")


# --- written and read again -----------------------------------------------------------------------------

lines = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()) and text.isprintable())
plain = st.one_of(st.none(), st.booleans(), st.integers(), lines, st.floats(allow_nan=False))
options = st.dictionaries(lines, plain, max_size=2)
flags = st.booleans()


def numbers(low: float, high: float = 1e9) -> st.SearchStrategy[float]:
    return st.floats(low, high)


def some_of(words: tuple[str, ...], *, least: int = 1) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(words), min_size=least, unique=True).map(tuple)


@st.composite
def settings_of(draw: st.DrawFn, cls: Any, needed: dict[str, Any], **optional: Any) -> Any:
    """Settings of which any optional keys are given; what breaks a rule between keys is drawn again."""
    values = draw(st.fixed_dictionaries(needed, optional=optional))
    try:
        return cls(**values)
    except ConfigError:
        reject()


layers = st.one_of(
    st.sampled_from(["all", "bottom", "top"]),
    st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True).map(tuple),
)
selection = {"towers": some_of(TOWERS), "layers": layers, "parts": some_of(PARTS)}
studies = settings_of(
    StudyConfig,
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "backbone": lines,
        "classes": st.lists(lines, min_size=2, max_size=5, unique=True).map(tuple),
    },
    template=st.just("a slide of {} cells"),
    data=st.none()
    | settings_of(
        DataConfig,
        {"source": lines},
        sites_by=st.sampled_from(["site", {"iid": {"sites": 4}}, {"dirichlet": {"alpha": 0.1}}]),
        on_problem=st.sampled_from(["stop", "skip"]),
        test_share=numbers(0.05, 0.95),
        options=options,
    ),
    shots=st.integers(1, 99),
    sigma=settings_of(SigmaConfig, {}, **selection),
    personal=st.none() | settings_of(PersonalConfig, {}, **selection),
    training=settings_of(
        LocalTrainingConfig,
        {},
        learning_rate=numbers(1e-9, 10),
        final_learning_rate=numbers(0, 1e-6),
        optimiser=st.sampled_from(OPTIMISERS),
        weight_decay=numbers(0, 100),
        proximal=numbers(0, 1e6),
        local_steps=st.integers(1, 99),
    ),
    federation=settings_of(
        FederationConfig,
        {},
        strategy=st.sampled_from(STRATEGIES),
        participation=numbers(1e-6, 1),
        cohorts=st.sampled_from(["random", "by_images"]),
        options=options,
        codec=st.sampled_from(CODECS),
        norm_bound=st.none() | numbers(1e-12),
        norm_factor=st.none() | numbers(1),
        masking=flags,
        max_examples=st.none() | st.integers(1, 10**6),
    ),
    privacy=settings_of(PrivacyConfig, {}, level=st.sampled_from(PRIVACY_LEVELS), epsilon=numbers(1e-3)),
    baselines=some_of(BASELINES, least=0),
    evaluate_versions=st.lists(lines, max_size=2).map(tuple),
    seed=st.integers(0, 2**31 - 1),
)
policies = settings_of(
    SitePolicy,
    {"name": lines, "source": lines, "studies": st.lists(st.text(max_size=9), max_size=3).map(tuple)},
    backbones=st.dictionaries(lines, lines, max_size=2),
    options=options,
    on_problem=st.sampled_from(["stop", "skip"]),
    test_share=numbers(0.05, 0.95),
    max_rounds=st.integers(1),
    share_confusion=flags,
    audit=st.text(),
    identity=st.text(),
    peers=st.dictionaries(lines, st.just(DIGEST), max_size=2),
    privacy=st.sampled_from(PRIVACY_LEVELS[:3]),
    epsilon=st.none() | numbers(1e-3),
    bundles=st.lists(st.just(DIGEST), max_size=2).map(tuple),
    cpus=st.none() | st.integers(1),
    gpus=st.sampled_from(["auto", "none", "0", "0,1"]),
)


@settings(deadline=None)
@given(studies)
def test_a_study_is_equal_when_written_and_read(study: StudyConfig) -> None:
    assert StudyConfig.from_yaml(study.to_yaml()) == study


@settings(deadline=None)
@given(policies)
def test_a_policy_is_equal_when_written_and_read(policy: SitePolicy) -> None:
    assert build(SitePolicy, read_yaml(write_yaml(policy), where="site.yaml"), where="site.yaml") == policy


def test_null_is_written_where_it_is_not_the_default() -> None:
    study = StudyConfig(
        name="x", backbone="b", classes=("a", "b"), federation=FederationConfig(norm_factor=None)
    )
    assert "norm_factor: null" in study.to_yaml() and "personal" not in study.to_yaml()
    assert StudyConfig.from_yaml(study.to_yaml()).federation.norm_factor is None
