"""The report of a run: one self-contained HTML file, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from fedsigma.server.report.terminal import summary_table
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["summary_table", "write_report"]


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` from the files of a run in any state, replacing an older one; return its path."""
    # matplotlib is slow to import, and a run writes its report only once.
    from fedsigma.common.utils.files import write_atomic
    from fedsigma.server.report.data import collect_report_data
    from fedsigma.server.report.page import render

    write_atomic(run_dir.report_path, render(collect_report_data(run_dir)).encode("utf-8", "replace"))
    return run_dir.report_path
