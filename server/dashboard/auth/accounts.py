"""Users of the dashboard, their sessions, and tokens of programs that collect its metrics.

Stored in SQLite in the server's folder, or in memory for a dashboard of simulations. The file alone does not
allow signing in: passwords are stored as argon2id hashes and tokens as SHA-256 hashes, and CSRF tokens are
not stored but derived from the session token.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import QueuePool, create_engine, delete, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from fedsigma.server.dashboard.auth.passwords import (
    METRICS,
    AccountsError,
    check_name,
    check_password,
    check_role,
    normalize_password,
)
from fedsigma.server.deployment.database import set_sqlite_pragmas, utc_now

__all__ = ["LINK", "OIDC", "PASSWORD", "Accounts", "User"]

PASSWORD, OIDC, LINK = "password", "oidc", "link"
"""How a session was opened."""

_LAST_USED_RESOLUTION_S = 60
"""A session's last use is stored at most once in so many seconds, to save writes."""


class _Base(DeclarativeBase):
    """Base of all tables."""


class UserAccount(_Base):
    """A local user."""

    __tablename__ = "users"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    hash: Mapped[str]
    created_at: Mapped[datetime.datetime]
    disabled: Mapped[bool] = mapped_column(default=False)


class ProgramToken(_Base):
    """The token of a program."""

    __tablename__ = "tokens"
    role: ClassVar = METRICS
    disabled: ClassVar = False
    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime.datetime]


class _Session(_Base):
    """A session. Times are seconds since 1970; `role` is only used for users without a local account."""

    __tablename__ = "sessions"
    digest: Mapped[str] = mapped_column(primary_key=True)
    user: Mapped[str] = mapped_column(index=True)
    method: Mapped[str]
    role: Mapped[str]
    started_at: Mapped[float]
    last_used_at: Mapped[float]


@dataclass(frozen=True, kw_only=True)
class User:
    """The user of a request.

    Attributes:
        name: Name of the user.
        role: `viewer` or `operator`.
        csrf: CSRF token that the user's forms must send.
    """

    name: str
    role: str
    csrf: str


class Accounts:
    """The accounts of one dashboard; the database is created if it does not exist.

    Args:
        path: SQLite file, readable by its owner only; None keeps everything in memory.
        max_age: Seconds after which a session ends.
        idle_timeout: Seconds after which an unused session ends.
        clock: Returns seconds since 1970.
        hasher: Password hasher; the defaults of argon2-cffi (RFC 9106, low memory) if None.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_age: float = 12 * 3600,
        idle_timeout: float = 30 * 60,
        clock: Callable[[], float] = time.time,
        hasher: PasswordHasher | None = None,
    ) -> None:
        self._max_age, self._idle_timeout, self._clock = max_age, idle_timeout, clock
        self._hasher = hasher or PasswordHasher()
        if path is None:
            # A single connection, shared by all threads: a second one would open another, empty database.
            self._engine = create_engine(
                "sqlite://",
                poolclass=QueuePool,
                pool_size=1,
                max_overflow=0,
                connect_args={"check_same_thread": False},
            )
        else:
            # SQLite creates its journal files with the same mode.
            path.touch(mode=0o600)
            path.chmod(0o600)
            self._engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", set_sqlite_pragmas)
        _Base.metadata.create_all(self._engine)
        self._session = sessionmaker(self._engine, expire_on_commit=False).begin

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    def add_user(self, name: str, *, role: str, password: str) -> None:
        """Add a user.

        Raises:
            AccountsError: The name is taken, or the name, role or password is invalid.
        """
        check_name(name)
        check_role(role)
        user = UserAccount(name=name, role=role, hash=self._hash(name, password), created_at=utc_now())
        with self._session() as session:
            _check_free(session, name)
            session.add(user)

    def update_user(
        self, name: str, *, role: str | None = None, password: str | None = None, disabled: bool | None = None
    ) -> None:
        """Change a user and end the user's sessions; arguments that are None are not changed.

        Raises:
            AccountsError: There is no such user, or the role or password is invalid.
        """
        if role is not None:
            check_role(role)
        password_hash = None if password is None else self._hash(name, password)
        with self._session() as session:
            user = _get_user(session, name)
            for key, value in {"role": role, "hash": password_hash, "disabled": disabled}.items():
                if value is not None:
                    setattr(user, key, value)
            _end_sessions(session, name)

    def _hash(self, name: str, password: str) -> str:
        check_password(password, name=name)
        return self._hasher.hash(normalize_password(password))

    def remove(self, name: str) -> UserAccount | ProgramToken:
        """Remove and return a user, whose sessions end, or a program's token.

        Raises:
            AccountsError: There is no such user or token.
        """
        with self._session() as session:
            row = session.get(ProgramToken, name) or _get_user(session, name)
            _end_sessions(session, name)
            session.delete(row)
            return row

    def list_accounts(self) -> list[UserAccount | ProgramToken]:
        """Return all users and tokens, sorted by name."""
        with self._session() as session:
            rows = [*session.scalars(select(UserAccount)), *session.scalars(select(ProgramToken))]
            return sorted(rows, key=lambda row: row.name)

    def has_user(self, name: str) -> bool:
        """Return whether there is such a user."""
        with self._session() as session:
            return session.get(UserAccount, name) is not None

    def verify_password(self, name: str, password: str) -> bool:
        """Return whether this is the password of an enabled user.

        The computation takes as long for unknown names, so that it does not reveal which users exist.
        """
        unknown_user_hash, normalized = self._unknown_user_hash, normalize_password(password)
        with self._session() as session:
            user = session.get(UserAccount, name)
        enabled = user is not None and not user.disabled
        stored_hash = user.hash if user is not None and enabled else unknown_user_hash
        try:
            self._hasher.verify(stored_hash, normalized)
        except (VerificationError, InvalidHashError):
            return False
        if not enabled:
            return False
        if self._hasher.check_needs_rehash(stored_hash):
            # Unless the password was changed meanwhile.
            unchanged = (UserAccount.name == name) & (UserAccount.hash == stored_hash)
            with self._session() as session:
                session.execute(
                    update(UserAccount).where(unchanged).values(hash=self._hasher.hash(normalized))
                )
        return True

    @cached_property
    def _unknown_user_hash(self) -> str:
        """Hash of a random password, verified for unknown users."""
        return self._hasher.hash(secrets.token_hex())

    def open_session(self, name: str, *, method: str = PASSWORD, role: str = "") -> str:
        """Open a session and return its token; `role` is for users of the other methods than `password`.

        Raises:
            AccountsError: The user was removed or disabled, or the role is unknown.
        """
        if method != PASSWORD:
            check_role(role)
        token, time_s = secrets.token_urlsafe(32), self._clock()
        with self._session() as session:
            if method == PASSWORD and _get_user(session, name).disabled:
                raise AccountsError(f"user '{name}' is disabled: fedsigma users change {name} --enable")
            expired = (_Session.started_at <= time_s - self._max_age) | (
                _Session.last_used_at <= time_s - self._idle_timeout
            )
            session.execute(delete(_Session).where(expired))
            times = {"started_at": time_s, "last_used_at": time_s}
            session.add(_Session(digest=_digest(token), user=name, method=method, role=role, **times))
        return token

    def find_user(self, token: str, *, active: bool = True) -> User | None:
        """Return the user of a session, or None if it has ended; polling is not `active` use."""
        time_s = self._clock()
        with self._session() as session:
            row = session.get(_Session, _digest(token))
            if row is None:
                return None
            if time_s - row.started_at >= self._max_age or time_s - row.last_used_at >= self._idle_timeout:
                session.delete(row)
                return None
            role = row.role
            if row.method == PASSWORD:
                user = session.get(UserAccount, row.user)
                if user is None or user.disabled:
                    return None
                role = user.role
            if active and time_s - row.last_used_at >= min(_LAST_USED_RESOLUTION_S, self._idle_timeout / 10):
                row.last_used_at = time_s
            return User(name=row.user, role=role, csrf=_csrf_token(token))

    def end_session(self, token: str) -> None:
        """End a session, if it exists."""
        with self._session() as session:
            session.execute(delete(_Session).where(_Session.digest == _digest(token)))

    def add_token(self, name: str) -> str:
        """Create and return a token that allows a program to read the metrics; only its hash is stored.

        Raises:
            AccountsError: The name is taken or invalid.
        """
        check_name(name)
        token = secrets.token_urlsafe(32)
        with self._session() as session:
            _check_free(session, name)
            session.add(ProgramToken(name=name, digest=_digest(token), created_at=utc_now()))
        return token

    def find_token(self, token: str) -> str | None:
        """Return the name of the program with this token, or None."""
        with self._session() as session:
            # Looking up the hash instead of the token makes timing attacks useless.
            return session.scalar(select(ProgramToken.name).where(ProgramToken.digest == _digest(token)))


def _digest(token: str) -> str:
    # Tokens are 256 random bits: no slow hash is needed against guessing.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _csrf_token(token: str) -> str:
    return hmac.new(token.encode("utf-8"), b"fedsigma dashboard forms", hashlib.sha256).hexdigest()


def _check_free(session: Session, name: str) -> None:
    if session.get(UserAccount, name) is not None or session.get(ProgramToken, name) is not None:
        raise AccountsError(f"'{name}' already exists: choose another name, or remove it first")


def _get_user(session: Session, name: str) -> UserAccount:
    user = session.get(UserAccount, name)
    if user is None:
        raise AccountsError(f"no user '{name[:80]}': see `fedsigma users list`")
    return user


def _end_sessions(session: Session, name: str) -> None:
    """End the sessions of a local user; a user of an OpenID provider may have the same name."""
    session.execute(delete(_Session).where(_Session.user == name, _Session.method == PASSWORD))
