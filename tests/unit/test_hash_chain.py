"""Logs in which what was changed or removed is found."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common.utils.hash_chain import HashChainedLog, Head, LogTampered


def filled(folder: Path, lines: int = 5) -> HashChainedLog:
    log = HashChainedLog(folder / "log.jsonl")
    for number in range(lines):
        log.append({"number": number, "text": "é\n\u2028" * number})
    return log


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = filled(tmp_path / "deep")
    assert [line["number"] for line in log.lines()] == [0, 1, 2, 3, 4]
    assert log.lines()[2] == {"number": 2, "text": "é\n\u2028" * 2}
    assert HashChainedLog(tmp_path / "none").check() == ([], Head(0))


@given(data=st.data())
def test_any_changed_or_removed_line_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = filled(tmp_path_factory.mktemp("chain"))
    lines = log.path.read_bytes().splitlines(keepends=True)
    first = data.draw(st.integers(0, 4))
    what = data.draw(st.sampled_from(["remove", "change", "swap", "twice", "cut"]))
    if what == "remove":
        del lines[first : data.draw(st.integers(first + 1, 5))]
    elif what == "change":
        lines[first] = lines[first].replace(b'"number": ', b'"number": 1')
    elif what == "swap":
        other = data.draw(st.integers(0, 4).filter(lambda n: n != first))
        lines[first], lines[other] = lines[other], lines[first]
    elif what == "twice":
        lines.insert(first, lines[first])
    else:
        lines = lines[:first]
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(LogTampered) as raised:
        log.lines()
    assert raised.value.line <= 6


def test_nothing_is_appended_to_a_log_whose_end_is_gone(tmp_path: Path) -> None:
    """Otherwise a new head would be written, which hides the removal."""
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(LogTampered, match="it has 3 lines, its head notes 5"):
        log.append({})
    assert log.path.read_bytes() == b"".join(lines[:3])


def test_a_head_noted_elsewhere_detects_a_forged_log(tmp_path: Path) -> None:
    log = filled(tmp_path)
    head = log.check()[1]
    assert Head.parse(f" {head}\n") == head
    log.append({"number": 5})
    assert log.check(head)[1].lines == 6
    log.path.unlink()
    log.head_path.unlink()
    forged = filled(tmp_path, 4)
    assert len(forged.lines()) == 4
    with pytest.raises(LogTampered, match="1 lines were removed from the end"):
        forged.check(head)
    forged.append({"number": "other"})
    with pytest.raises(LogTampered, match="line 5 is not the one that was noted"):
        forged.check(head)


@pytest.mark.parametrize("head", [True, False], ids=["before-the-head", "before-the-line-ends"])
def test_a_crash_while_writing_costs_that_line_at_most(head: bool, tmp_path: Path) -> None:
    log = filled(tmp_path)
    before, head_content = log.path.read_bytes(), log.head_path.read_bytes()
    log.append({"number": 5})
    log.head_path.write_bytes(head_content)
    if not head:
        log.path.write_bytes(before + b'{"number": 5, "prev')
    log.append({"number": 6})
    assert [line["number"] for line in log.lines()] == [0, 1, 2, 3, 4, *([5] if head else []), 6]
    assert log.check()[1].lines == (7 if head else 6)


def test_a_line_longer_than_a_block_is_followed(tmp_path: Path) -> None:
    log = HashChainedLog(tmp_path / "log.jsonl")
    for size in (200_000, 3, 70_000, 65_536):
        log.append({"text": "x" * size})
    assert [len(line["text"]) for line in log.lines()] == [200_000, 3, 70_000, 65_536]


def test_many_writers_make_one_chain(tmp_path: Path) -> None:
    def write(writer: int) -> None:
        for number in range(20):
            HashChainedLog(tmp_path / "log.jsonl").append({"writer": writer, "number": number})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines, head = HashChainedLog(tmp_path / "log.jsonl").check()
    assert head.lines == len(lines) == 80


@pytest.mark.parametrize("text", ["", "5", "5:abc", "x:" + "0" * 64, "5:" + "0" * 64 + "0"])
def test_invalid_head_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no head of a log"):
        Head.parse(text)
    log = filled(tmp_path)
    log.head_path.write_text(text)
    for call in (log.lines, lambda: log.append({})):
        with pytest.raises(LogTampered, match=r"its head log\.jsonl\.head was changed"):
            call()


def test_the_lines_are_json_for_other_tools(tmp_path: Path) -> None:
    log = filled(tmp_path, 2)
    first, second = (json.loads(line) for line in log.path.read_text().splitlines())
    assert first["previous"] == "" and len(second["previous"]) == 64


def test_log_can_be_read_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = HashChainedLog(tmp_path / "log.jsonl")
    chain.append({"n": 1})
    read = Path.read_bytes

    def and_then_another(self: Path) -> bytes:
        content = read(self)
        monkeypatch.setattr(Path, "read_bytes", read)
        chain.append({"n": 2})
        return content

    monkeypatch.setattr(Path, "read_bytes", and_then_another)
    assert [line["n"] for line in chain.lines()] == [1]
    assert [line["n"] for line in chain.lines()] == [1, 2]
