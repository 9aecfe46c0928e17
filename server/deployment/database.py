"""The server's database: sites, node keys and submissions."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload

__all__ = ["NodeKey", "ServerDatabase", "Site", "Submission", "set_sqlite_pragmas", "utc_now"]


ACTIVE, RETIRING, REVOKED = "active", "retiring", "revoked"
"""States of a node's key: in use, in use until its successor is seen, or refused."""


class _Base(DeclarativeBase):
    """Base class of all tables."""


class Site(_Base):
    """A site that was invited; `word` is the secret of its last invitation, empty once that was used."""

    __tablename__ = "sites"
    name: Mapped[str] = mapped_column(primary_key=True)
    word: Mapped[str] = mapped_column(default="")
    expires: Mapped[str] = mapped_column(default="")
    identity: Mapped[str] = mapped_column(default="")
    note: Mapped[str] = mapped_column(default="")
    invited_at: Mapped[datetime.datetime]
    keys: Mapped[list[NodeKey]] = relationship(back_populates="owner", order_by="NodeKey.added_at")

    @property
    def state(self) -> str:
        """`invited`, `joined` or `revoked`."""
        if not self.keys:
            return "invited"
        return "revoked" if all(key.state == REVOKED for key in self.keys) else "joined"


class NodeKey(_Base):
    """A node key of a site, with Flower's id of its node."""

    __tablename__ = "node_keys"
    node_id: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"))
    public_key: Mapped[str]
    state: Mapped[str] = mapped_column(default=ACTIVE)
    added_at: Mapped[datetime.datetime]
    owner: Mapped[Site] = relationship(back_populates="keys")


class Submission(_Base):
    """A study that was submitted to Flower; `digest` is the SHA-256 of the study as resolved."""

    __tablename__ = "submissions"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    study: Mapped[str]
    digest: Mapped[str]
    folder: Mapped[str]
    submitted_at: Mapped[datetime.datetime]
    resumes: Mapped[str] = mapped_column(default="")


class ServerDatabase:
    """The database of one server; created at first use.

    Args:
        folder: The server's folder; FEDSIGMA_DATABASE may name another database than its server.db by an
            SQLAlchemy URL.
    """

    def __init__(self, folder: Path) -> None:
        url = os.environ.get("FEDSIGMA_DATABASE") or f"sqlite:///{folder / 'server.db'}"
        self._engine = create_engine(url)
        if url.startswith("sqlite"):
            event.listen(self._engine, "connect", set_sqlite_pragmas)
        _Base.metadata.create_all(self._engine)

    @classmethod
    def from_environment(cls) -> ServerDatabase | None:
        """Return the database of the server that started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_SERVER", "")
        return cls(Path(folder)) if folder else None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open a session that commits at the end of its block, and rolls back on an exception."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def sites(self) -> list[Site]:
        """Return all sites with their keys, by name."""
        query = select(Site).order_by(Site.name).options(selectinload(Site.keys))
        with self.session() as session:
            return list(session.scalars(query))

    def submissions(self, *, study: str | None = None) -> list[Submission]:
        """Return all submissions, or those of one study, the latest first."""
        query = select(Submission).order_by(Submission.submitted_at.desc())
        with self.session() as session:
            return list(session.scalars(query if study is None else query.where(Submission.study == study)))

    def node_problem(self, node: int, name: str) -> str:
        """Return why a node cannot be the site of this name; empty if it is.

        A node proves its identity by its key, but it could claim any name. The database is read each time,
        since sites may join during a run.
        """
        keys = {k.node_id: s.name for s in self.sites() for k in s.keys if k.state != REVOKED}
        site = keys.get(str(node))
        if site == name:
            return ""
        return f"its node belongs to site '{site}'" if site else "its node belongs to no site of this server"


def set_sqlite_pragmas(connection: object, _: object) -> None:
    """Make SQLite check references, wait for other writers, and survive a power failure."""
    for pragma in ("foreign_keys = ON", "busy_timeout = 10000", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")  # type: ignore[attr-defined]


def utc_now() -> datetime.datetime:
    """Return the present time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
