"""Which site each node is, for the process that runs a study at a server."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

__all__ = ["NodeKey", "NodeNames", "ServerDatabase", "Site", "Submission", "set_sqlite_pragmas", "utc_now"]


class NodeNames:
    """The sites that a server has let in, by node.

    A node proves by its key that it is the one that was let in; what it calls itself, it could make up. So at
    a server the name in a site's answer has to be the one that belongs to its node.

    Args:
        path: of the server's folder.
    """

    def __init__(self, path: Path) -> None:
        self._registry = ServerDatabase(path / "server.db")

    @classmethod
    def from_environment(cls) -> NodeNames | None:
        """Those of the server whose `fedsigma server up` started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_SERVER", "")
        return cls(Path(folder)) if folder else None

    def problem(self, node: int, name: str) -> str:
        """Say why this node cannot be the site of this name; empty if it is. Sites may join meanwhile."""
        keys = {k.node_id: s.name for s in self._registry.sites() for k in s.keys if k.state != REVOKED}
        known = keys.get(str(node))
        if known == name:
            return ""
        return (
            f"its node belongs to site '{known}'" if known else "its node belongs to no site of this server"
        )


ACTIVE, RETIRING, REVOKED = "active", "retiring", "revoked"
"""What a node's key may be: used, used until its successor is, or refused."""


class _Base(DeclarativeBase):
    """All tables."""


class Site(_Base):
    """A site that was invited. word: of the last invitation, empty once it was used."""

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
    """A node key of a site, and the number that Flower gave its node."""

    __tablename__ = "node_keys"
    node_id: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"))
    public_key: Mapped[str]
    state: Mapped[str] = mapped_column(default=ACTIVE)
    added_at: Mapped[datetime.datetime]
    owner: Mapped[Site] = relationship(back_populates="keys")


class Submission(_Base):
    """A study that was handed to Flower. digest: SHA-256 of the study as resolved."""

    __tablename__ = "submissions"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    study: Mapped[str]
    digest: Mapped[str]
    folder: Mapped[str]
    submitted_at: Mapped[datetime.datetime]
    resumes: Mapped[str] = mapped_column(default="")


class ServerDatabase:
    """The database of one server; made at first use.

    Args:
        path: of the SQLite file.
    """

    def __init__(self, path: Path) -> None:
        url = os.environ.get("FEDSIGMA_DATABASE") or f"sqlite:///{path}"
        self._engine = create_engine(url)
        if url.startswith("sqlite"):
            event.listen(self._engine, "connect", set_sqlite_pragmas)
        _Base.metadata.create_all(self._engine)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session whose changes are kept if its block ends well, and undone otherwise."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def sites(self) -> list[Site]:
        """All sites with their keys, by name."""
        with self.session() as session:
            found = list(session.scalars(select(Site).order_by(Site.name)))
            for site in found:
                _ = list(site.keys)
            return found

    def submissions(self, *, study: str | None = None) -> list[Submission]:
        """All submissions, or those of a study, the latest first."""
        query = select(Submission).order_by(Submission.submitted_at.desc())
        with self.session() as session:
            return list(session.scalars(query if study is None else query.where(Submission.study == study)))


def set_sqlite_pragmas(connection: object, _: object) -> None:
    """Have SQLite check references, wait for other writers, and survive a power cut."""
    for pragma in ("foreign_keys = ON", "busy_timeout = 10000", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")  # type: ignore[attr-defined]


def utc_now() -> datetime.datetime:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
