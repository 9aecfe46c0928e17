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
from fedsigma.server.paper.cell import Finished, Score
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
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("accuracy", sa.Float),
    sa.Column("scores", sa.Text, nullable=False),
)


def key_of(cell: Cell, study: StudyConfig, trained_on: PublishedSet) -> str:
    """What a cell trains, as a digest: by which settings, on which lists of images.

    Where a set lies does not count. What is trained by other settings, or on a set whose classes, images or
    sites have changed, is another cell. What judges it is not part of it: the same model may be judged on a
    set that came later. Settings that have their defaults are left out, so that a cell is found again by a
    later version that has more of them.
    """
    # The places of the sets are left out, too: which they are is told below.
    data = DataConfig(source=study.data.source) if study.data else None
    plain = StudyConfig(name=study.name, backbone="any", classes=study.classes, data=data)
    content = _other_than(asdict(plain), asdict(study))
    content.get("data", {}).get("options", {}).pop("root", None)
    told = [trained_on.classes, trained_on.digest]
    place = [cell.protocol, cell.trained_on, cell.row, cell.shots, cell.seed]
    return hashlib.sha256(json.dumps([place, content, told], sort_keys=True).encode()).hexdigest()


def _shown(url: str) -> str:
    """An URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return f"'{url}'"


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
        place: A file of SQLite, made if it is not there, or an URL of SQLAlchemy's.

    Raises:
        ConfigError: There is no such database, or it is not one of these results.
    """

    def __init__(self, place: Path | str) -> None:
        url = place if isinstance(place, str) else f"sqlite:///{place}"
        try:
            # A run may take hours, in which a server drops the connection.
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            _METADATA.create_all(self._engine)
            with self._engine.connect() as connection:
                for table in (_CELLS, _SCORES):
                    connection.execute(sa.select(table).limit(1))
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            raise ConfigError(
                f"the results database {_shown(url)} cannot be used ({reason}): expected an URL of"
                " SQLAlchemy's, as sqlite:///results.sqlite, of a database that can be written to"
            ) from error

    def find(self, key: str, digests: Mapping[str, str]) -> list[Score]:
        """What is known of a cell on these sets, by name, with the digests of what they list."""
        wanted = sa.select(_SCORES).where(_SCORES.c.key == key)
        with self._engine.connect() as connection:
            rows = connection.execute(wanted).all()
        return [
            Score(judged_on=r.judged_on, half=r.half, images=r.images, scores=json.loads(r.scores))
            for r in rows
            if digests.get(r.judged_on) == r.digest
        ]

    def keep(
        self, key: str, cell: Cell, study: StudyConfig, done: Finished, digests: Mapping[str, str]
    ) -> None:
        """Write a finished cell, or further scores of it, all or nothing."""
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
        """End the connections."""
        self._engine.dispose()
