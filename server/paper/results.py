"""The results database: one row a finished cell, one a score, in SQLite or any database of SQLAlchemy's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedsigma import __version__
from fedsigma.common.config import DataConfig, StudyConfig
from fedsigma.server.paper.running import Finished, Score
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell

__all__ = ["Results", "key_of"]

_METADATA = sa.MetaData()
_CELLS = sa.Table(
    "cells",
    _METADATA,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("protocol", sa.String(40), nullable=False),
    sa.Column("trained_on", sa.String(80), nullable=False),
    sa.Column("setting", sa.String(120), nullable=False),
    sa.Column("shots", sa.Integer, nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("backbone", sa.String(200), nullable=False),
    sa.Column("sites", sa.Integer, nullable=False),
    sa.Column("examples", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("bytes_up", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("finished_at", sa.String(40), nullable=False),
    sa.Column("study", sa.Text, nullable=False),
)
_SCORES = sa.Table(
    "scores",
    _METADATA,
    sa.Column("key", sa.ForeignKey("cells.key", ondelete="CASCADE"), primary_key=True),
    sa.Column("judged_on", sa.String(80), primary_key=True),
    sa.Column("half", sa.String(10), primary_key=True),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("accuracy", sa.Float),
    sa.Column("scores", sa.Text, nullable=False),
)


def key_of(cell: Cell, study: StudyConfig, sets: Iterable[PublishedSet]) -> str:
    """What a cell is, as a digest: what it trains, on how many images of which sets, and what judges it.

    Where a set lies does not count. What is trained by other settings, or on a set that has changed in number
    or classes, is another cell. Settings that have their defaults are left out, so that a cell is found again
    by a later version that has more of them.
    """
    # The places of the sets are left out, too: which they are is told below.
    data = DataConfig(source=study.data.source) if study.data else None
    plain = StudyConfig(name=study.name, backbone="any", classes=study.classes, data=data)
    content = _other_than(asdict(plain), asdict(study))
    content.get("data", {}).get("options", {}).pop("root", None)
    told = [
        [one.name, one.classes, one.counts]
        for one in sorted(sets, key=lambda one: one.name)
        if one.name in (cell.trained_on, *cell.judged_on)
    ]
    place = [cell.protocol, cell.trained_on, cell.row, cell.shots, cell.seed, list(cell.judged_on)]
    return hashlib.sha256(json.dumps([place, content, told], sort_keys=True).encode()).hexdigest()


def _other_than(plain: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The entries of nested settings that differ."""
    found = {}
    for name, value in given.items():
        default = plain.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _other_than(default, value) or default
        if value != default:
            found[name] = value
    return found


class Results:
    """The cells that are done.

    Args:
        place: a file of SQLite, made if it is not there, or an URL of SQLAlchemy's.
    """

    def __init__(self, place: Path | str) -> None:
        url = place if isinstance(place, str) else f"sqlite:///{place}"
        self._engine = sa.create_engine(url)
        _METADATA.create_all(self._engine)

    def find(self, key: str) -> list[Score] | None:
        """The scores of a cell, None before it is done."""
        with self._engine.connect() as connection:
            if connection.execute(sa.select(_CELLS.c.key).where(_CELLS.c.key == key)).first() is None:
                return None
            rows = connection.execute(sa.select(_SCORES).where(_SCORES.c.key == key)).all()
        return [
            Score(judged_on=r.judged_on, half=r.half, images=r.images, scores=json.loads(r.scores))
            for r in rows
        ]

    def keep(self, key: str, cell: Cell, study: StudyConfig, done: Finished) -> None:
        """Write a finished cell, all of it or nothing."""
        row = {
            "key": key,
            "protocol": cell.protocol,
            "trained_on": cell.trained_on,
            "setting": cell.row,
            "shots": cell.shots,
            "seed": cell.seed,
            "backbone": study.backbone,
            "sites": done.sites,
            "examples": done.examples,
            "steps": done.steps,
            "bytes_up": done.bytes_up,
            "seconds": round(done.seconds, 2),
            "version": __version__,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "study": study.to_yaml(),
        }
        scores = [
            {
                "key": key,
                "judged_on": one.judged_on,
                "half": one.half,
                "images": one.images,
                "accuracy": one.scores.get("accuracy"),
                "scores": json.dumps(one.scores),
            }
            for one in done.scores
        ]
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_SCORES).where(_SCORES.c.key == key))
            connection.execute(sa.delete(_CELLS).where(_CELLS.c.key == key))
            connection.execute(sa.insert(_CELLS), row)
            connection.execute(sa.insert(_SCORES), scores)

    def close(self) -> None:
        """End the connections."""
        self._engine.dispose()
