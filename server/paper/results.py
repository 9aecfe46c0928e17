"""The results database: a row per trained cell and one per score, in any database of SQLAlchemy's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedsigma.common import __version__
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import DataConfig, StudyConfig
from fedsigma.server.paper.cell import Score, TrainingCost
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell

__all__ = ["ResultsDatabase", "cell_key"]

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
    sa.Column("evaluated_on", sa.String(80), primary_key=True),
    sa.Column("half", sa.String(10), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("accuracy", sa.Float),
    sa.Column("scores", sa.Text, nullable=False),
)


def cell_key(cell: Cell, study: StudyConfig, trained_on: PublishedSet) -> str:
    """Return a digest of what a cell's training depends on: its settings and lists of images.

    Left out are the location of the set, the sets that evaluate the model, since there may later be more of
    them, and settings with default values, so that later versions with more settings find the cell.
    """
    data = DataConfig(source=study.data.source) if study.data else None
    plain = StudyConfig(name=study.name, backbone="any", classes=study.classes, data=data)
    content = _different(asdict(plain), asdict(study))
    content.get("data", {}).get("options", {}).pop("root", None)
    data_of_set = [trained_on.classes, trained_on.digest]
    identity = [cell.protocol, cell.trained_on, cell.row, cell.shots, cell.seed]
    return hashlib.sha256(json.dumps([identity, content, data_of_set], sort_keys=True).encode()).hexdigest()


def _different(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of nested settings that differ from the defaults."""
    different = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _different(default, value) or default
        if value != default:
            different[name] = value
    return different


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return f"'{url}'"


class ResultsDatabase:
    """Database of the finished cells.

    Args:
        location: An SQLite file, created if missing, or an SQLAlchemy URL.

    Raises:
        ConfigError: The database cannot be used.
    """

    def __init__(self, location: Path | str) -> None:
        url = location if isinstance(location, str) else f"sqlite:///{location}"
        try:
            # A run may take hours, during which a server drops the connection.
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            _METADATA.create_all(self._engine)
            with self._engine.connect() as connection:
                for table in (_CELLS, _SCORES):
                    connection.execute(sa.select(table).limit(1))
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            raise ConfigError(
                f"the results database {_without_password(url)} cannot be used ({reason}): expected an"
                " SQLAlchemy URL of a writable database, such as sqlite:///results.sqlite"
            ) from error

    def find(self, key: str, digests: Mapping[str, str]) -> list[Score]:
        """Return the scores of a cell on these sets.

        Args:
            key: Key of the cell.
            digests: Digest of each set's lists of images, by name.
        """
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_SCORES).where(_SCORES.c.key == key)).all()
        return [
            Score(evaluated_on=r.evaluated_on, half=r.half, images=r.images, scores=json.loads(r.scores))
            for r in rows
            if digests.get(r.evaluated_on) == r.digest
        ]

    def save(
        self,
        key: str,
        cell: Cell,
        study: StudyConfig,
        scores: Sequence[Score],
        cost: TrainingCost,
        seconds: float,
        digests: Mapping[str, str],
    ) -> None:
        """Save a finished cell, or further scores of it, in one transaction."""
        row = {
            "key": key,
            "protocol": cell.protocol,
            "trained_on": cell.trained_on,
            "setting": cell.row,
            "shots": cell.shots,
            "seed": cell.seed,
            "backbone": study.backbone,
            **asdict(cost),
            "seconds": round(seconds, 2),
            "version": __version__,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "study": study.to_yaml(),
        }
        score_rows = [
            asdict(score)
            | {
                "key": key,
                "digest": digests[score.evaluated_on],
                "accuracy": score.scores.get("accuracy"),
                "scores": json.dumps(score.scores),
            }
            for score in scores
        ]
        names = {score.evaluated_on for score in scores}
        with self._engine.begin() as connection:
            if connection.execute(sa.select(_CELLS.c.key).where(_CELLS.c.key == key)).first() is None:
                connection.execute(sa.insert(_CELLS), row)
            connection.execute(
                sa.delete(_SCORES).where(_SCORES.c.key == key, _SCORES.c.evaluated_on.in_(names))
            )
            connection.execute(sa.insert(_SCORES), score_rows)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()
