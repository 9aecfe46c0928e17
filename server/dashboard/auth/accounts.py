"""Who may see the dashboard: users, their sessions, and the tokens of programs that collect its metrics.

SQLite in the server's folder, or in memory for a dashboard of simulations. Whoever reads the file can sign in
with nothing in it: passwords are kept as argon2id hashes, tokens as SHA-256, and the token against forged
requests is not kept at all but made from the session's.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import QueuePool, create_engine, delete, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fedsigma.server.dashboard.auth.passwords import AccountsError, check_name, check_password, plain
from fedsigma.server.deployment.database import set_sqlite_pragmas, utc_now

if TYPE_CHECKING:
    from argon2 import PasswordHasher

__all__ = ["METRICS", "OPERATOR", "ROLES", "VIEWER", "Account", "Accounts", "AccountsError", "User"]

VIEWER, OPERATOR, METRICS = "viewer", "operator", "metrics"
ROLES = (VIEWER, OPERATOR)
"""What a user may do: look, or act as well. `metrics` is what tokens of programs are listed as."""

PASSWORD, OIDC, LINK = "password", "oidc", "link"
"""How a session was opened."""

_NOTED = 60
"""Seconds for which a session's last use is not written again, so that reading pages seldom writes."""


class _Base(DeclarativeBase):
    """All tables."""


class _User(_Base):
    __tablename__ = "users"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    hash: Mapped[str]
    made_at: Mapped[datetime.datetime]
    disabled: Mapped[bool] = mapped_column(default=False)


class _Session(_Base):
    """began, seen: seconds since 1970. role: of who signed in elsewhere; a local user's is looked up."""

    __tablename__ = "sessions"
    digest: Mapped[str] = mapped_column(primary_key=True)
    user: Mapped[str] = mapped_column(index=True)
    way: Mapped[str]
    role: Mapped[str]
    began: Mapped[float]
    seen: Mapped[float]


class _Token(_Base):
    __tablename__ = "tokens"
    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    made_at: Mapped[datetime.datetime]


@dataclass(frozen=True, kw_only=True)
class User:
    """Who a request comes from. csrf: what its forms have to send along."""

    name: str
    role: str
    csrf: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user, or a program's token (role `metrics`), as lists show it."""

    name: str
    role: str
    made_at: datetime.datetime
    disabled: bool = False


class Accounts:
    """The accounts of one dashboard; made at first use.

    Args:
        path: of the SQLite file, which its owner alone can read; None keeps all in memory.
        longest: seconds after which a session ends.
        idle: seconds after which it ends if nobody uses it.
        clock: seconds since 1970.
        hasher: of passwords; argon2-cffi's own choice (RFC 9106, low memory) unless given.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        longest: float = 12 * 3600,
        idle: float = 30 * 60,
        clock: Callable[[], float] = time.time,
        hasher: PasswordHasher | None = None,
    ) -> None:
        self._longest, self._idle, self._clock = longest, idle, clock
        self._given = hasher
        if path is None:
            # One connection, which threads take in turn: another would be another, empty database.
            self._engine = create_engine(
                "sqlite://",
                poolclass=QueuePool,
                pool_size=1,
                max_overflow=0,
                connect_args={"check_same_thread": False},
            )
        else:
            # SQLite gives the files beside it the same mode.
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.fchmod(file, 0o600)
            os.close(file)
            self._engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", set_sqlite_pragmas)
        _Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    # -- users ---------------------------------------------------------------------------------------------

    def add(self, name: str, *, role: str, password: str) -> None:
        """Add a user.

        Raises:
            AccountsError: the name is taken, or name, role or password do not do.
        """
        check_name(name)
        _check_role(role)
        check_password(password, name=name)
        made = _User(name=name, role=role, hash=self._hasher.hash(plain(password)), made_at=utc_now())
        with self._session() as session:
            _check_free(session, name)
            session.add(made)

    def change(
        self, name: str, *, role: str | None = None, password: str | None = None, disabled: bool | None = None
    ) -> None:
        """Change what is given of a user, and end the user's sessions.

        Raises:
            AccountsError: there is no such user, or role or password do not do.
        """
        values: dict[str, Any] = {}
        if role is not None:
            _check_role(role)
            values["role"] = role
        if password is not None:
            check_password(password, name=name)
            values["hash"] = self._hasher.hash(plain(password))
        if disabled is not None:
            values["disabled"] = disabled
        with self._session() as session:
            user = _known(session, name)
            for key, value in values.items():
                setattr(user, key, value)
            _end(session, name)

    def remove(self, name: str) -> Account:
        """Remove a user and end the user's sessions; or remove a program's token.

        Returns:
            What was removed.

        Raises:
            AccountsError: there is no such user or token.
        """
        with self._session() as session:
            token = session.get(_Token, name)
            found: _User | _Token = token if token is not None else _known(session, name)
            _end(session, name)
            session.delete(found)
            return _account(found)

    def everyone(self) -> list[Account]:
        """All users and tokens, by name."""
        with self._session() as session:
            found = [*session.scalars(select(_User)), *session.scalars(select(_Token))]
            return sorted((_account(row) for row in found), key=lambda account: account.name)

    def has(self, name: str) -> bool:
        """Whether there is such a user."""
        with self._session() as session:
            return session.get(_User, name) is not None

    def verify(self, name: str, password: str) -> bool:
        """Whether this is an enabled user's password. As much is computed for names that nobody has."""
        from argon2.exceptions import InvalidHashError, VerificationError

        nobody, given = self._nobody, plain(password)
        with self._session() as session:
            user = session.get(_User, name)
        known = user is not None and not user.disabled
        kept = user.hash if user is not None and known else nobody
        try:
            self._hasher.verify(kept, given)
        except (VerificationError, InvalidHashError):
            return False
        if not known:
            return False
        if self._hasher.check_needs_rehash(kept):
            self._renew(name, kept, self._hasher.hash(given))
        return True

    def _renew(self, name: str, old: str, new: str) -> None:
        """Put a hash with today's parameters in the place of an older one, if that still stands."""
        with self._session() as session:
            session.execute(update(_User).where(_User.name == name, _User.hash == old).values(hash=new))

    @cached_property
    def _hasher(self) -> PasswordHasher:
        if self._given is not None:
            return self._given
        try:
            from argon2 import PasswordHasher
        except ImportError:
            raise AccountsError("argon2 is not installed: pip install 'fedsigma[dashboard]'") from None
        return PasswordHasher()

    @cached_property
    def _nobody(self) -> str:
        """The hash of a password that nobody has."""
        return self._hasher.hash(secrets.token_hex())

    # -- sessions ------------------------------------------------------------------------------------------

    def open(self, name: str, *, way: str = PASSWORD, role: str = "") -> str:
        """Open a session and return its token.

        Args:
            name: of the user.
            way: `password` for a user of these accounts; `oidc` or `link` for others.
            role: of those others.

        Raises:
            AccountsError: the user was removed or disabled meanwhile, or the role is not known.
        """
        if way != PASSWORD:
            _check_role(role)
        token, moment = secrets.token_urlsafe(32), self._clock()
        with self._session() as session:
            if way == PASSWORD and _known(session, name).disabled:
                raise AccountsError(f"'{name}' is disabled: fedsigma users change {name} --enable")
            ended = (_Session.began <= moment - self._longest) | (_Session.seen <= moment - self._idle)
            session.execute(delete(_Session).where(ended))
            session.add(
                _Session(digest=_digest(token), user=name, way=way, role=role, began=moment, seen=moment)
            )
        return token

    def find(self, token: str, *, used: bool = True) -> User | None:
        """The user whose session this token is of, unless it ended; `used`: by a person, just now."""
        moment = self._clock()
        with self._session() as session:
            found = session.get(_Session, _digest(token))
            if found is None:
                return None
            if moment - found.began >= self._longest or moment - found.seen >= self._idle:
                session.delete(found)
                return None
            role = found.role
            if found.way == PASSWORD:
                user = session.get(_User, found.user)
                if user is None or user.disabled:
                    return None
                role = user.role
            if used and moment - found.seen >= min(_NOTED, self._idle / 10):
                found.seen = moment
            return User(name=found.user, role=role, csrf=_csrf(token))

    def end(self, token: str) -> None:
        """End a session, if there is one."""
        with self._session() as session:
            session.execute(delete(_Session).where(_Session.digest == _digest(token)))

    # -- tokens of programs --------------------------------------------------------------------------------

    def add_token(self, name: str) -> str:
        """Make a token by which a program reads the metrics; it is told this once.

        Raises:
            AccountsError: the name is taken or does not do.
        """
        check_name(name)
        token = secrets.token_urlsafe(32)
        with self._session() as session:
            _check_free(session, name)
            session.add(_Token(name=name, digest=_digest(token), made_at=utc_now()))
        return token

    def token_name(self, token: str) -> str | None:
        """The name of a program's token, or None."""
        with self._session() as session:
            # The digest is looked up, not the token: how long that takes tells nothing about a token.
            return session.scalar(select(_Token.name).where(_Token.digest == _digest(token)))


def _digest(token: str) -> str:
    # Tokens are 256 random bits: nothing slower is needed to keep them from being guessed.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _csrf(token: str) -> str:
    return hmac.new(token.encode("utf-8"), b"fedsigma dashboard forms", hashlib.sha256).hexdigest()


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise AccountsError(f"the role is '{role}', expected {' or '.join(ROLES)}")


def _check_free(session: Session, name: str) -> None:
    if session.get(_User, name) is not None or session.get(_Token, name) is not None:
        raise AccountsError(f"'{name}' is there already: take another name, or remove it first")


def _known(session: Session, name: str) -> _User:
    user = session.get(_User, name)
    if user is None:
        raise AccountsError(f"there is no user '{name[:80]}': see `fedsigma users list`")
    return user


def _end(session: Session, name: str) -> None:
    """End the sessions of a local user; who signed in elsewhere may have the same name and is another."""
    session.execute(delete(_Session).where(_Session.user == name, _Session.way == PASSWORD))


def _account(row: _User | _Token) -> Account:
    if isinstance(row, _Token):
        return Account(name=row.name, role=METRICS, made_at=row.made_at)
    return Account(name=row.name, role=row.role, made_at=row.made_at, disabled=row.disabled)
