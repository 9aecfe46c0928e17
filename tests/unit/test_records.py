"""Messages: what goes in comes out, and nothing else can be in them."""

import dataclasses
import math

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.wire import records
from fedsigma.common.wire.records import (
    EvaluateReply,
    EvaluateTask,
    Evaluation,
    HandshakeReply,
    HandshakeRequest,
    ProtocolError,
    StudySpec,
    TrainReply,
    TrainTask,
    from_record,
    to_record,
    wire_bytes,
)

STUDY = StudyConfig.from_yaml(
    "{name: s, backbone: starter, classes: [a, b], data: {source: demo}, sigma: {layers: [0, 2]}}"
)
SETUP = StudySpec.of(STUDY)
SCORES = Evaluation(accuracy=0.5, balanced_accuracy=0.25, auroc=math.nan, f1=1.0, ece=0.0, test_examples=8)
TASK = TrainTask(
    study=SETUP,
    recipe=LocalTrainingConfig(optimiser="sgd"),
    mode="round",
    round=2,
    cohort=3,
    first_step=20,
    steps=20,
    total_steps=40,
    codec="exact",
    evaluate=True,
    shift=b"\0\xff",
)
REPLY = TrainReply(update=b"abc", examples=4, steps=20, loss=0.5, evaluation=SCORES, class_counts=(1, 3))
MESSAGES = [
    HandshakeRequest(protocol=records.PROTOCOL, study=SETUP, fingerprint="{}"),
    HandshakeReply(protocol=records.PROTOCOL, site="north", fingerprint="{}", version="0.1.0", sites=4),
    TASK,
    REPLY,
    EvaluateTask(study=SETUP, round=3, shifts=(b"1", b"2")),
    EvaluateReply(evaluations=(SCORES, dataclasses.replace(SCORES, accuracy=1.0))),
    EvaluateReply(evaluations=()),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back(message: object) -> None:
    back = from_record(type(message), to_record(message))
    assert repr(back) == repr(message)  # nan is not equal to itself, its name is


def test_study_spec_is_a_cache_key_and_keeps_the_selection() -> None:
    back = from_record(HandshakeRequest, to_record(MESSAGES[0])).study
    assert back == SETUP and hash(back) == hash(SETUP)
    assert back.sigma == STUDY.sigma and back.data == STUDY.data
    assert StudySpec.of(dataclasses.replace(STUDY, data=None, baselines=())).data is None


def fields_of(message: object) -> dict:
    return dict(to_record(message).config_records["fedsigma"])


def record(values: dict) -> RecordDict:
    return RecordDict({"fedsigma": ConfigRecord(values)})


@pytest.mark.parametrize("name", sorted(fields_of(REPLY)))
def test_a_missing_field_is_refused(name: str) -> None:
    values = fields_of(REPLY)
    del values[name]
    with pytest.raises(ProtocolError):
        from_record(TrainReply, record(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patient": "0815"}, "1 fields that a TrainReply does not have"),
        ({"examples": 0}, "examples is 0"),
        ({"examples": 4.0}, "'examples' is of type float, expected int"),
        ({"examples": True}, "'examples' is of type bool"),
        ({"loss": math.inf}, "loss is infinite"),
        ({"loss": 1}, "'loss' is of type int"),
        ({"update": "text"}, "'update' is of type str"),
        ({"class_counts": 3}, "'class_counts' is not a list"),
        ({"class_counts": ["a"]}, "'class_counts' is of type str"),
        ({"evaluation.accuracy": 1.5}, "accuracy is 1.5"),
        ({"evaluation.test_examples": 0}, "contradict"),
        ({"kind": "Hello"}, "not a TrainReply"),
        ({"update": b"\0" * (5 * 1024 * 1024)}, "at most"),
    ],
)
def test_a_changed_field_is_refused_with_the_reason(change: dict, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        from_record(TrainReply, record({**fields_of(REPLY), **change}))


def test_other_records_beside_the_message_are_refused() -> None:
    for extra in (MetricRecord({"loss": 1.0}), ArrayRecord(), ConfigRecord({"path": "/data"})):
        content = to_record(REPLY)
        content["extra"] = extra
        with pytest.raises(ProtocolError, match="other records"):
            from_record(TrainReply, content)


def test_only_messages_can_be_sent() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(TrainReply):
        patient: str = "0815"

    with pytest.raises(ProtocolError, match="must not be sent"):
        to_record(Wider(**{f.name: getattr(REPLY, f.name) for f in dataclasses.fields(REPLY)}))
    with pytest.raises(ProtocolError, match="must not be sent"):
        to_record({"loss": 1.0})
    with pytest.raises(ProtocolError, match="at most"):
        to_record(dataclasses.replace(REPLY, update=b"\0" * records.MAX_REPLY_BYTES))


@pytest.mark.parametrize("name", ["", ALL_SITES, "a\nb", "x" * 81])
def test_a_site_name_is_short_and_printable(name: str) -> None:
    with pytest.raises(ProtocolError):
        HandshakeReply(protocol=records.PROTOCOL, site=name, fingerprint="{}", version="0.1.0")


@pytest.mark.parametrize("version", ["", "0.1.0\n", "0\u202e1", "1" * 65])
def test_a_version_is_short_and_printable(version: str) -> None:
    values = {**fields_of(MESSAGES[1]), "version": version}
    with pytest.raises(ProtocolError, match="version is empty, too long or not printable"):
        from_record(HandshakeReply, record(values))


def test_a_schedule_must_fit() -> None:
    with pytest.raises(ProtocolError, match="30 steps from 20 do not fit into 40"):
        dataclasses.replace(TASK, steps=30)


def test_metrics_that_cannot_be_computed_are_left_out() -> None:
    assert "auroc" not in SCORES.metrics() and SCORES.metrics()["test_examples"] == 8


def test_wire_bytes_counts_the_shift() -> None:
    longer = to_record(dataclasses.replace(REPLY, update=b"abc" + b"\0" * 1000))
    assert wire_bytes(longer) == wire_bytes(to_record(REPLY)) + 1000


values = st.one_of(
    st.integers(-5, 5), st.floats(), st.text(max_size=5), st.binary(max_size=5), st.lists(st.integers(0, 9))
)


@given(st.dictionaries(st.sampled_from([*fields_of(REPLY), "other"]), values))
def test_any_record_gives_a_message_or_a_protocol_error(changes: dict) -> None:
    try:
        reply = from_record(TrainReply, record({**fields_of(REPLY), **changes}))
    except ProtocolError:
        return
    assert type(reply.examples) is int and reply.examples >= 1


@given(st.dictionaries(st.sampled_from([*fields_of(MESSAGES[1]), "other"]), values))
def test_any_answer_to_the_handshake_is_a_message_or_a_protocol_error(changes: dict) -> None:
    try:
        reply = from_record(HandshakeReply, record({**fields_of(MESSAGES[1]), **changes}))
    except ProtocolError:
        return
    assert reply.version.isprintable() and 0 < len(reply.version) <= 64 and reply.site.isprintable()
