"""Copy the cells of `fedsigma bench paper` between its results database and a text file.

    python -m bench.paper_cells import bench/results/paper.jsonl out/paper/results.sqlite
    python -m bench.paper_cells export out/paper/results.sqlite bench/results/paper.jsonl

The text file has one cell a line with its scores, sorted. An import adds the cells that the database lacks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedsigma.common.utils.files import write_atomic
from fedsigma.server.paper.results import ResultsDatabase

ORDER = ("protocol", "trained_on", "setting", "shots", "seed", "key")


def _open(database: Path) -> tuple[sa.Engine, sa.Table, sa.Table]:
    database.parent.mkdir(parents=True, exist_ok=True)
    ResultsDatabase(database).close()  # creates the tables of a new file
    engine, metadata = sa.create_engine(f"sqlite:///{database}"), sa.MetaData()
    metadata.reflect(engine)
    return engine, metadata.tables["cells"], metadata.tables["scores"]


def export_cells(database: Path, file: Path) -> int:
    """Write all cells of a database; returns their number."""
    engine, cells, scores = _open(database)
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(sa.select(cells)).mappings()]
        by_key: dict[str, list[dict[str, Any]]] = {row["key"]: [] for row in rows}
        query = sa.select(scores).order_by(*scores.primary_key.columns)
        for score in connection.execute(query).mappings():
            content = {name: value for name, value in score.items() if name != "key"}
            by_key[score["key"]].append(content | {"scores": json.loads(score["scores"])})
    engine.dispose()
    rows.sort(key=lambda row: [row[name] for name in ORDER])
    lines = [json.dumps({"cell": row, "scores": by_key[row["key"]]}) + "\n" for row in rows]
    write_atomic(file, "".join(lines).encode())
    return len(rows)


def import_cells(file: Path, database: Path) -> int:
    """Add the cells of a file that a database lacks; returns their number."""
    engine, cells, scores = _open(database)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with engine.begin() as connection:
        present = set(connection.scalars(sa.select(cells.c.key)))
        added = [line for line in lines if line["cell"]["key"] not in present]
        for line in added:
            connection.execute(sa.insert(cells), line["cell"])
            for score in line["scores"]:
                row = score | {"key": line["cell"]["key"], "scores": json.dumps(score["scores"])}
                connection.execute(sa.insert(scores), row)
    engine.dispose()
    return len(added)


def main() -> None:
    """Import or export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=["import", "export"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    copy = import_cells if options.direction == "import" else export_cells
    print(f"{copy(options.source, options.target)} cells were written to {options.target}")


if __name__ == "__main__":
    main()
