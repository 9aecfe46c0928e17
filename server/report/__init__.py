"""The report of a run: one HTML file that needs nothing else, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from fedsigma.server.report.terminal import summary_table
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["summary_table", "write_report"]


def write_report(folder: RunDir) -> Path:
    """Write `report.html` from the files of a run, whatever state the run is in.

    Returns the path of the report. An older report is replaced.
    """
    # matplotlib is slow to import; a run asks for its report once, at its end.
    from fedsigma.common.utils.files import write_atomic
    from fedsigma.server.report.data import collect_report_data
    from fedsigma.server.report.page import render

    write_atomic(folder.report_path, render(collect_report_data(folder)).encode("utf-8", "replace"))
    return folder.report_path
