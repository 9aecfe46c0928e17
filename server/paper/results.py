"""The results database: one row a trained cell, one a score, in SQLite or any database of SQLAlchemy's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedsigma.common import __version__
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import DataConfig, StudyConfig
from fedsigma.server.paper.cell import CellResult, Score
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
    sa.Column("judged_on", sa.String(80), primary_key=True),
    sa.Column("half", sa.String(10), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("accuracy", sa.Float),
    sa.Column("scores", sa.Text, nullable=False),
)


def cell_key(cell: Cell, study: StudyConfig, trained_on: PublishedSet) -> str:
    """Return a digest of what a cell trains: its settings and lists of images.

    The location of a set does not count. Other settings, or a set whose classes, images or sites have
    changed, give another key. The sets that evaluate the model are not part of it, since the same model may
    later be evaluated on further sets. Settings with default values are left out, so that later versions with
    more settings find the cell again.
    """
    # The locations of the sets are left out; the sets themselves are identified below.
    data = DataConfig(source=study.data.source) if study.data else None
    plain = StudyConfig(name=study.name, backbone="any", classes=study.classes, data=data)
    content = _other_than(asdict(plain), asdict(study))
    content.get("data", {}).get("options", {}).pop("root", None)
    data_of_set = [trained_on.classes, trained_on.digest]
    identity = [cell.protocol, cell.trained_on, cell.row, cell.shots, cell.seed]
    return hashlib.sha256(json.dumps([identity, content, data_of_set], sort_keys=True).encode()).hexdigest()


def _shown(url: str) -> str:
    """Return a URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return f"'{url}'"


def _other_than(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of nested settings that differ."""
    changed = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _other_than(default, value) or default
        if value != default:
            changed[name] = value
    return changed


class ResultsDatabase:
    """Database of the finished cells.

    Args:
        place: An SQLite file, created if missing, or an SQLAlchemy URL.

    Raises:
        ConfigError: The database cannot be used.
    """

    def __init__(self, place: Path | str) -> None:
        url = place if isinstance(place, str) else f"sqlite:///{place}"
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
                f"the results database {_shown(url)} cannot be used ({reason}): expected an"
                " SQLAlchemy URL of a writable database, such as sqlite:///results.sqlite"
            ) from error

    def find(self, key: str, digests: Mapping[str, str]) -> list[Score]:
        """Return the scores of a cell on these sets.

        Args:
            key: Key of the cell.
            digests: Digest of each set's lists of images, by name.
        """
        query = sa.select(_SCORES).where(_SCORES.c.key == key)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [
            Score(judged_on=r.judged_on, half=r.half, images=r.images, scores=json.loads(r.scores))
            for r in rows
            if digests.get(r.judged_on) == r.digest
        ]

    def save(
        self, key: str, cell: Cell, study: StudyConfig, done: CellResult, digests: Mapping[str, str]
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
                "digest": digests[one.judged_on],
                "images": one.images,
                "accuracy": one.scores.get("accuracy"),
                "scores": json.dumps(one.scores),
            }
            for one in done.scores
        ]
        with self._engine.begin() as connection:
            if connection.execute(sa.select(_CELLS.c.key).where(_CELLS.c.key == key)).first() is None:
                connection.execute(sa.insert(_CELLS), row)
            names = {one.judged_on for one in done.scores}
            old = sa.delete(_SCORES).where(_SCORES.c.key == key, _SCORES.c.judged_on.in_(names))
            connection.execute(old)
            connection.execute(sa.insert(_SCORES), scores)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()
