"""The report: self-contained, escaped, complete in every state of a run, and consistent with summary.json."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedsigma.cli.study import app
from fedsigma.server.report import summary_table, write_report
from fedsigma.server.report.data import collect_report_data
from fedsigma.server.report.formatting import (
    format_bytes,
    format_duration,
    format_percent,
    format_points,
    format_ranges,
    truncate,
)
from fedsigma.server.runs import lock
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from tests.helpers.synthetic_run import HOSTILE, LONG_CLASSES, write_synthetic_run

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, ids, links, tables (as lists of rows of cell texts) and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"tags left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if "small" not in self._open and ("td" in self._open or "th" in self._open):
            self.tables[-1][-1][-1] += data

    def cells(self) -> set[str]:
        return {cell.strip() for table in self.tables for row in table for cell in row}


def page_of(folder: RunDir) -> tuple[Page, str]:
    text = write_report(folder).read_text(encoding="utf-8")
    return Page(text), text


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one site": {"sites": ["only"], "troubles": False},
    "fifty sites": {"sites": [f"hospital-{i:02d}" for i in range(1, 51)], "rounds": 6},
    "two hundred rounds": {"rounds": 200, "sites": ["a", "b"]},
    "no rounds": {"finished": 0, "troubles": False},
    "one round of many": {"finished": 1},
    "failed": {"finished": 2, "fail": "no round produced a model <yet>"},
    "failed at once": {"finished": 0, "fail": "no site came"},
    "no baselines": {"baselines": (), "troubles": False},
    "one baseline": {"baselines": ("pooled",)},
    "hostile": {"sites": HOSTILE, "classes": LONG_CLASSES, "name": "<b>bold</b> & co"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_complete_and_self_contained_in_every_state(tmp_path: Path, kind: str) -> None:
    page, text = page_of(write_synthetic_run(tmp_path / "run", **KINDS[kind]))
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None and "url(" not in style.group(1) and "@import" not in style.group(1)
    assert str(tmp_path) not in text
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, a in page.tags for name, value in a.items() if name == "href" and value}
    assert links <= set(ids)
    assert not re.search(r"#0a0[bc]\d\d", text), "a placeholder colour remains"


@pytest.mark.parametrize("kind", ["plain", "hostile", "fifty sites"])
def test_figures_have_alternative_texts_and_tables_have_headers(tmp_path: Path, kind: str) -> None:
    page, _ = page_of(write_synthetic_run(tmp_path / "run", **KINDS[kind]))
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 4
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in figures)
    names = [tag for tag, _ in page.tags]
    assert names.count("caption") == names.count("table") > 0
    assert all(a.get("scope") in ("row", "col") for tag, a in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_tables_show_the_values_of_the_summary(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    page, _ = page_of(folder)
    cells, summary = page.cells(), folder.read_summary()
    for method in ("zero_shot", "local_only", "pooled", "federated"):
        entry = summary[method]
        assert f"{100 * entry['accuracy']:.1f}%" in cells
        assert f"{100 * entry['metrics']['balanced_accuracy']:.1f}%" in cells
        assert {f"{entry['metrics'][name]:.3f}" for name in ("auroc", "f1", "ece")} <= cells
        for site, accuracy in entry["per_site"].items():
            rows = [row for table in page.tables for row in table if row[0].strip() == site]
            assert any(f"{100 * accuracy:.1f}%" in row for row in rows), (method, site)
    assert f"{100 * summary['local_only']['everywhere']:.1f}%" in cells
    assert "61.7 kB" in page.text


def test_confusion_matrix_has_true_classes_as_rows(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    page, _ = page_of(folder)
    rows = [row for table in page.tables for row in table if row[0].strip() == "lymphocyte"]
    # 40 on the diagonal and 0, 1, 2, 3 everywhere: the recall of lymphocytes is 41 of 46.
    assert rows == [["lymphocyte", "0", "41", "2", "3", "46", "89.1%"]]
    metrics = folder.read_summary()["federated"]["confusion"].pop("metrics")
    assert (
        f"balanced accuracy {100 * metrics['balanced_accuracy']:.1f}%, F1 {metrics['f1']:.3f}." in page.text
    )


def test_confusion_note_is_omitted_without_metrics(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    summary = folder.read_summary()
    del summary["federated"]["confusion"]["metrics"]
    folder.write_summary(summary)
    assert "Over all these images" not in page_of(folder)[0].text


def test_names_from_a_run_are_escaped(tmp_path: Path) -> None:
    page, text = page_of(write_synthetic_run(tmp_path / "run", **KINDS["hostile"]))
    for name in HOSTILE:
        assert name in page.text
        assert name not in text or "<" not in name
    assert "<b>bold</b> & co" in page.text
    assert "49 clinic" not in page.text
    assert all(name in page.text for name in LONG_CLASSES)


def test_site_named_like_a_placeholder_keeps_its_name(tmp_path: Path) -> None:
    name = 'id="x" #0a0b00'
    folder = write_synthetic_run(tmp_path / "run", sites=[name], rounds=2, troubles=False)
    text = write_report(folder).read_text()
    assert 'id="x" #0a0b00</text>' in text


def test_repeated_notices_are_merged_with_their_rounds(tmp_path: Path) -> None:
    page, _ = page_of(write_synthetic_run(tmp_path / "run"))
    rows = [row for table in page.tables for row in table]
    reason = "the shift's norm 81.2 is above the bound 50"
    assert ["west", "reply rejected", reason, "3–5, 8", "4 times"] in rows
    assert ["annex", "site refused", "its backbone weights differ from the study's", "–", "once"] in rows
    assert ["west", "site failed", "OutOfMemoryError", "6", "once"] in rows


def test_notices_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", rounds=2, troubles=False)
    for number in range(75):
        folder.log_event("reply_rejected", round=1, site=f"s{number}", reason="not finite")
    page, _ = page_of(folder)
    assert "15 more are in events.jsonl." in page.text


def test_failed_run_shows_its_reason(tmp_path: Path) -> None:
    page, _ = page_of(write_synthetic_run(tmp_path / "run", **KINDS["failed"]))
    assert "The run failed: no round produced a model <yet>" in page.text
    assert any(attributes.get("role") == "status" for _, attributes in page.tags)


def test_missing_baselines_are_named(tmp_path: Path) -> None:
    page, _ = page_of(write_synthetic_run(tmp_path / "run", **KINDS["no baselines"]))
    assert "Not part of this study: zero-shot, local only, pooled." in page.text
    assert "Pooled" not in page.cells()


def test_damaged_files_do_not_prevent_the_report(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    (folder.path / "sigma.safetensors").write_bytes(b"not a sigma file")
    (folder.path / "summary.json").write_text("{")
    (folder.path / "study.yaml").write_text("name: [")
    page, _ = page_of(folder)
    assert "The shift cannot be shown" in page.text


def test_shift_magnitude_is_the_mean_absolute_shift_by_part_and_layer(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", rounds=2)
    saved = folder.load_shift()
    entries = json.loads(saved.layout_json)
    selected = [e for e in entries if (e["tower"], e["layer"], e["part"]) == ("image", 7, "mlp")]
    assert len(selected) == 2
    values = np.concatenate([saved.shift.numpy()[e["offset"] : e["offset"] + e["size"]] for e in selected])
    magnitudes = collect_report_data(folder).shift_magnitudes
    image = next(m for m in magnitudes if m.tower == "image")
    cell = image.values[image.parts.index("mlp"), image.layers.index(7)]
    assert cell == pytest.approx(np.abs(values).mean(), rel=1e-5)


def test_report_is_replaced_and_deterministic_except_for_the_time(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", rounds=2)
    texts = [re.sub(r"on \S+ \S+ UTC", "", write_report(folder).read_text()) for _ in range(2)]
    assert texts[0] == texts[1]


def _printed(summary: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get()


def test_terminal_table_shows_all_methods(tmp_path: Path) -> None:
    summary = write_synthetic_run(tmp_path / "run").read_summary()
    text = _printed(summary)
    for method in ("zero_shot", "local_only", "pooled", "federated"):
        for value in (summary[method]["accuracy"], *summary[method]["per_site"].values()):
            assert format_percent(value) in text
    assert all(site in text for site in summary["sites"])
    assert format_points(summary["federated"]["accuracy"] - summary["zero_shot"]["accuracy"]) in text
    many = write_synthetic_run(tmp_path / "many", sites=[f"h{i}" for i in range(50)], rounds=2).read_summary()
    assert "Lowest site" in _printed(many) and "h7" not in _printed(many)
    assert "Method" in _printed({})
    assert "[red]x" in _printed({"study": "[red]x", "federated": {"accuracy": 0.5, "per_site": {"[b]": 0.5}}})


def test_commands_list_runs_and_write_reports(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path / "runs" / "good", rounds=2)
    write_synthetic_run(tmp_path / "runs" / "bad", finished=0, fail="no site came")
    runner = CliRunner()
    listed = runner.invoke(app, ["runs", str(tmp_path / "runs"), "--json"])
    assert listed.exit_code == 0
    found = {Path(run["path"]).name: run for run in json.loads(listed.stdout)}
    assert (found["good"]["state"], found["good"]["rounds_done"]) == ("finished", 2)
    assert (found["bad"]["state"], found["bad"]["reason"]) == ("failed", "no site came")
    table = runner.invoke(app, ["runs", str(tmp_path / "runs")]).stdout
    assert "good" in table and "2/2" in table and "failed" in table

    written = runner.invoke(app, ["report", str(tmp_path / "runs" / "good")])
    assert written.exit_code == 0
    assert Path(written.stdout.strip()).is_file()
    for arguments in (["report", str(tmp_path / "none")], ["runs", str(tmp_path / "none")]):
        result = runner.invoke(app, arguments)
        assert result.exit_code != 0
        assert isinstance(result.exception, RunDirError)
    (tmp_path / "empty").mkdir()
    assert "No runs found in" in runner.invoke(app, ["runs", str(tmp_path / "empty")]).stdout


def test_running_run_is_shown_as_running_and_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    runner, folder = CliRunner(), write_synthetic_run(tmp_path / "runs" / "one", rounds=4, finished=2)
    text = Page(write_report(folder).read_text()).text
    assert "Interrupted" in text and "interrupted" in runner.invoke(app, ["runs", str(tmp_path)]).stdout
    with folder.lock():
        assert "running" in runner.invoke(app, ["runs", str(tmp_path)]).stdout
        assert "Running" in Page(write_report(folder).read_text()).text
        again = runner.invoke(app, ["study", "run", "demo", "--resume", "--out", str(folder.path)])
    assert isinstance(again.exception, RunDirError) and "still running" in str(again.exception)


def test_formatting() -> None:
    assert [format_percent(0.4567), format_percent(None), format_percent(float("nan"))] == ["45.7%", "–", "–"]
    assert [format_points(0.123), format_points(-0.05)] == ["+12.3", "\N{MINUS SIGN}5.0"]
    sizes = (0, 999, 61_700, 2.5e6, 7e12)
    assert [format_bytes(size) for size in sizes] == ["0 B", "999 B", "61.7 kB", "2.5 MB", "7000.0 GB"]
    assert [format_duration(9), format_duration(201.7), format_duration(3700)] == [
        "9 s",
        "3 min 22 s",
        "1 h 1 min",
    ]
    assert format_ranges([8, 3, 4, 5, 10, 11]) == "3–5, 8, 10, 11"
    assert [truncate("abcdef", 6), truncate("abcdefg", 6)] == ["abcdef", "abcde…"]
