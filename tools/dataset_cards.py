"""The cards of published data sets as the table of docs/datasets.md.

    python -m tools.dataset_cards --json out/dataset_cards.json

Sizes, licences and addresses are the cards'; nothing is measured, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedsigma.common.config.schema import to_plain
from fedsigma.common.data.catalog.card import DatasetCard, cards
from fedsigma.common.utils.files import write_atomic

HEADS = ("name", "set", "classes", "train", "val", "test", "licence")


def row(one: DatasetCard) -> str:
    """One line of the table, in Markdown."""
    sizes = [f"{size:,}" if size else "-" for size in (one.images.train, one.images.val, one.images.test)]
    cells = [f"`{one.name}`", f"[{one.title}]({one.page})", f"{one.class_count:,}", *sizes, one.licence]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All cards, in Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|--:|--:|--:|--:|---|"]
    return "\n".join([*lines, *(row(one) for one in cards().values())])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all cards here, too")
    args = parser.parse_args()
    print(table())
    if args.json:
        write_atomic(args.json, json.dumps([to_plain(one) for one in cards().values()], indent=2).encode())


if __name__ == "__main__":
    main()
