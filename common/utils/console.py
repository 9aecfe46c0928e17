"""Plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(heads: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print these columns of the rows; long cells are folded, not cut."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[head]) for head in heads))
    Console().print(table)
