"""Personal parts: what of the shift stays at a site, through rounds, restarts and repeats."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.client.site.personal_state import PersonalError, PersonalState, read_personal_values
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.sigma import PersonalConfig
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.sigma import Entry, Fingerprint, Layout, LayoutError, ParameterPartition
from fedsigma.common.training.trainer import make_partition, trainers
from fedsigma.common.wire.codec import decode
from fedsigma.common.wire.messages import TrainReply, TrainTask
from fedsigma.common.wire.records import from_record
from fedsigma.server.report import write_report
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_trainer import NAMES, SIZE, STUDY, FakeTrainer, fake_method  # noqa: F401
from tests.integration.test_masked_rounds import drop
from tests.integration.test_rounds import events, run, shift_of
from tests.unit.test_training import task as tiny_task

pytestmark = pytest.mark.usefixtures("fake_method", "two_entries")
SHARED, OWN = 4, SIZE - 4
LAYOUT = Layout(
    (
        Entry(weight="w", part="q", tower="image", layer=0, offset=0, size=SHARED, rows=(0, SHARED)),
        Entry(weight="w", part="v", tower="text", layer=0, offset=SHARED, size=OWN, rows=(SHARED, SIZE)),
    )
)
FINGERPRINT = Fingerprint("a" * 64, LAYOUT.digest, ((1.0, 2.0), (1.0, 2.0)))
PLAIN = STUDY.replace("[zero_shot, local_only, pooled]", "[zero_shot]")
STUDY_OWN = PLAIN + "personal: {towers: [text]}\n"
SPLIT = ParameterPartition(LAYOUT, frozenset({LAYOUT.entries[1].key}))


class TwoEntries(FakeTrainer):
    layout = LAYOUT
    fingerprint = FINGERPRINT


@pytest.fixture
def two_entries(fake_method: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(trainers, "factory", TwoEntries)


def part(folder: Path, run: str = "0" * 16, split: ParameterPartition = SPLIT) -> PersonalState:
    return PersonalState(folder, study="fake", run=run, partition=split, fingerprint=FINGERPRINT)


def kept(tmp_path: Path, key: str, site: str = "bccd") -> PersonalState:
    return part(tmp_path / "audit" / "personal" / site, key)


# --- the split ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=8))
def test_gather_and_scatter_are_inverse(entries: list[tuple[int, bool]]) -> None:
    if len({own for _, own in entries}) == 1:
        entries = [(entries[0][0], not entries[0][1]), *entries[1:]]
    layout_entries, offset = [], 0
    for number, (size, _) in enumerate(entries):
        layout_entries.append(Entry(str(number), "q", "image", number, offset, size, (0, size)))
        offset += size
    full = Layout(tuple(layout_entries))
    own = frozenset(e.key for e, (_, is_own) in zip(layout_entries, entries, strict=True) if is_own)
    split, shift = ParameterPartition(full, own), np.arange(1, offset + 1, dtype=np.float32)
    assert split.shared.size + split.personal_size == offset
    assert np.array_equal(split.combine(split.shared_values(shift), split.personal_values(shift)), shift)
    for entry in split.shared.entries:
        before = next(e for e in layout_entries if e.key == entry.key)
        values = split.shared_values(shift)[entry.offset : entry.offset + entry.size]
        assert np.array_equal(values, shift[before.offset : before.offset + before.size])
    assert split.combine(split.shared_values(shift)).sum() == split.shared_values(shift).sum()


def test_without_a_personal_part_the_layout_is_as_it_was() -> None:
    split = ParameterPartition(LAYOUT)
    assert split.shared is LAYOUT and split.personal_size == 0


def test_all_or_nothing_cannot_be_personal() -> None:
    with pytest.raises(LayoutError, match="so none are shared"):
        ParameterPartition(LAYOUT, frozenset(e.key for e in LAYOUT.entries))
    with pytest.raises(LayoutError, match="no adapted weight is personal"):
        ParameterPartition(LAYOUT, frozenset({"elsewhere"}))


@pytest.mark.parametrize(
    ("personal", "picked"),
    [
        (PersonalConfig(towers=("text",)), lambda e: e.tower == "text"),
        (PersonalConfig(parts=("mlp",)), lambda e: e.part == "mlp"),
        (PersonalConfig(towers=("image",), layers=(1,)), lambda e: e.tower == "image" and e.layer == 1),
        (PersonalConfig(layers="top"), lambda e: (e.tower, e.layer) == ("text", 2)),
    ],
)
def test_layers_selected_by_a_personal_section(personal: PersonalConfig, picked: Any, tmp_path: Path) -> None:
    sigma = tiny_task(tmp_path).sigma
    split = make_partition(sigma, personal)
    own = sum(e.size for e in sigma.layout.entries if picked(e))
    assert split.personal_size == own > 0
    assert {e.key for e in split.shared.entries} == {e.key for e in sigma.layout.entries if not picked(e)}


# --- whole studies ------------------------------------------------------------------------------------


def test_no_personal_value_leaves_a_site(tmp_path: Path) -> None:
    sent: list[bytes] = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train":
            sent.append(from_record(TrainReply, reply.content).update)
            assert len(from_record(TrainTask, task.content).shift) == len(sent[-1])
        return reply

    folder = run(tmp_path, STUDY_OWN, tamper=watch)
    assert all(decode(update, SPLIT.shared).size == SHARED for update in sent) and len(sent) == 12
    final = [kept(tmp_path, folder.key, site).current() for site in NAMES]
    assert all(np.abs(values).min() > 0.01 for values in final)
    assert len({values.tobytes() for values in final}) == len(NAMES)
    for values in final:
        assert not any(values.tobytes() in update for update in sent)
    assert not shift_of(folder)[SHARED:].any() and shift_of(folder)[:SHARED].any()


def test_the_shared_part_is_what_it_would_be_with_everything_shared(tmp_path: Path) -> None:
    """The fake sites move each value by itself, so that keeping some at home must not change the others."""
    open_, own = run(tmp_path, PLAIN, out="open"), run(tmp_path, STUDY_OWN, out="own")
    np.testing.assert_allclose(shift_of(own)[:SHARED], shift_of(open_)[:SHARED], rtol=1e-6)


def test_the_final_model_is_evaluated_with_and_without_personal_values(tmp_path: Path) -> None:
    folder = run(tmp_path, STUDY_OWN)
    summary = folder.read_summary()
    both, alone = summary["federated"]["accuracy"], summary["shared_only"]["accuracy"]
    assert both > alone > summary["zero_shot"]["accuracy"]
    for site in NAMES:
        own = SPLIT.combine(shift_of(folder)[:SHARED], kept(tmp_path, folder.key, site).current())
        accuracy = TwoEntries("fake", None, None, None).evaluate(own, _tests(site)).metrics["accuracy"]
        assert summary["federated"]["per_site"][site] == pytest.approx(accuracy)
    assert "Shared part only" in write_report(folder).read_text()
    assert "shared_only" not in run(tmp_path, PLAIN, out="open").read_summary()


def _tests(site: str) -> list[Any]:
    from tests.helpers.fake_trainer import load

    return load("source", [site], name=site).test


def test_rounds_are_evaluated_with_personal_values(tmp_path: Path) -> None:
    folder = run(tmp_path, STUDY_OWN)
    rows = {(r["round"], r["site"]): r["accuracy"] for r in folder.rounds()}
    summary = folder.read_summary()
    assert rows[1, "bccd"] == summary["zero_shot"]["per_site"]["bccd"]
    assert rows[4, "bccd"] == summary["federated"]["per_site"]["bccd"]
    assert rows[2, "jiangxi"] < rows[3, "jiangxi"] < rows[4, "jiangxi"]


def test_resumed_study_finds_the_personal_values(tmp_path: Path) -> None:
    whole = run(tmp_path, STUDY_OWN, out="whole")

    class Stop(BaseException):
        pass

    def stop(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train" and from_record(TrainTask, task.content).round == 3:
            raise Stop
        return reply

    with pytest.raises(Stop):
        run(tmp_path, STUDY_OWN, out="cut", tamper=stop)
    cut = run(tmp_path, STUDY_OWN, out="cut", resume=True)
    np.testing.assert_array_equal(shift_of(cut), shift_of(whole))
    for site in NAMES:
        np.testing.assert_array_equal(
            kept(tmp_path, cut.key, site).current(), kept(tmp_path, whole.key, site).current()
        )


def test_another_run_begins_without_them(tmp_path: Path) -> None:
    first, second = run(tmp_path, STUDY_OWN, out="a"), run(tmp_path, STUDY_OWN, out="b")
    assert first.key != second.key
    np.testing.assert_array_equal(shift_of(first), shift_of(second))


def test_with_secure_aggregation_the_values_are_stored_once_a_round(tmp_path: Path) -> None:
    masked = STUDY_OWN.replace("rounds:", "masking: true, rounds:")
    folder = run(tmp_path, masked, tamper=drop(102, 2))
    plain = run(tmp_path, STUDY_OWN, out="plain", tamper=drop(102, 2))
    assert len(events(folder, "masked_round_retried")) == 1
    for site in NAMES:
        np.testing.assert_allclose(
            kept(tmp_path, folder.key, site).current(), kept(tmp_path, plain.key, site).current(), atol=1e-4
        )


def test_damaged_file_stops_the_site_and_its_path_is_not_reported(tmp_path: Path) -> None:
    def damage(node: int, task: Message, reply: Message) -> Message:
        if node == 101 and task.metadata.message_type == "train":
            (file,) = (tmp_path / "audit" / "personal" / "bccd").glob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-3])
        return reply

    folder = run(tmp_path, STUDY_OWN, tamper=damage)
    failed = events(folder, "site_failed")
    assert {(e["site"], e["reason"]) for e in failed} == {("bccd", "PersonalError")}


# --- the file -----------------------------------------------------------------------------------------


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def test_a_retried_round_starts_from_the_same_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = part(tmp_path)
    assert not state.current().any() and not state.initial(1).any()
    state.store(values(0, 0), values(1, 2), round=1)
    state.store(values(1, 2), values(3, 4), round=2)
    again = part(tmp_path)
    assert again.initial(2).tolist() == [1, 2]
    assert again.initial(3).tolist() == again.current().tolist() == [3, 4]
    assert again.initial(1).tolist() == [0, 0]
    again.store(values(3, 4), values(5, 6), round=5)
    with caplog.at_level(logging.WARNING):
        assert again.initial(3).tolist() == [5, 6]
    assert "the personal values after round 5" in caplog.text
    assert not part(tmp_path, "1" * 16).current().any()


@pytest.mark.parametrize(
    ("split", "fingerprint", "words"),
    [
        (ParameterPartition(LAYOUT, frozenset({LAYOUT.entries[0].key})), FINGERPRINT, "other personal parts"),
        (SPLIT, Fingerprint("b" * 64, LAYOUT.digest, ((1.0, 2.0),)), "another backbone"),
    ],
)
def test_a_file_of_something_else_is_refused(
    split: ParameterPartition, fingerprint: Fingerprint, words: str, tmp_path: Path
) -> None:
    part(tmp_path).store(values(0, 0), values(1, 2), round=1)
    other = PersonalState(tmp_path, study="fake", run="0" * 16, partition=split, fingerprint=fingerprint)
    with pytest.raises(PersonalError, match=words):
        other.current()


def test_a_file_of_another_study_or_run_is_refused(tmp_path: Path) -> None:
    state = part(tmp_path)
    state.store(values(0, 0), values(1, 2), round=1)
    other = part(tmp_path, "1" * 16)
    state.path.rename(other.path)
    with pytest.raises(PersonalError, match=r"values of run '0000.*expected run '1111"):
        other.current()
    with pytest.raises(PersonalError, match="values of study 'fake', expected study 'else'"):
        read_personal_values(other.path, SPLIT, FINGERPRINT, study="else", run="0" * 16)


def test_a_study_s_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    state = PersonalState(tmp_path, study="../../x", run="0" * 16, partition=SPLIT, fingerprint=FINGERPRINT)
    assert state.path.parent == tmp_path and ".." not in state.path.name


def test_moved_run_folder_is_recognized_by_its_key(tmp_path: Path) -> None:
    folder = run(tmp_path, STUDY_OWN)
    key = folder.key
    moved = folder.path.rename(tmp_path / "moved")
    assert RunDir.open(moved).key == key
    assert run(tmp_path, STUDY_OWN).key != key


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    part(tmp_path).store(values(0, 0), values(1, np.nan), round=1)
    with pytest.raises(PersonalError, match="finite float32 values"):
        part(tmp_path).current()


# --- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STUDY + "personal: {towers: [text]}\n", "local_only', which would send"),
        (PLAIN + "personal: {towers: [eyes]}\n", "personal.towers is 'eyes'"),
        (PLAIN + "personal: {layer: top}\n", "did you mean 'layers'"),
        (PLAIN + "personal: {layers: all}\n", r"personal is .towers: .image, text.*all that sigma adapts"),
        (
            PLAIN + "sigma: {towers: [image]}\npersonal: {towers: [text]}\n",
            r"personal is .towers: .text.*nothing of what sigma adapts",
        ),
        (PLAIN + "personal: text\n", "personal is 'text', expected keys and values"),
    ],
)
def test_a_wrong_section_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StudyConfig.from_yaml(text)


def test_a_study_reads_back_as_written() -> None:
    for text in (PLAIN, STUDY_OWN):
        study = StudyConfig.from_yaml(text)
        assert StudyConfig.from_yaml(study.to_yaml()) == study
    assert "personal" not in StudyConfig.from_yaml(PLAIN).to_yaml()
