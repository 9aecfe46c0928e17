"""Signing in by an OpenID provider of the organisation: code flow with PKCE, by Authlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from fedsigma.common.config.fields import ListOf
from fedsigma.common.config.schema import ConfigError, build, check_printable, read_yaml, settings
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.dashboard.auth.accounts import OPERATOR, VIEWER
from fedsigma.server.dashboard.auth.settings import check_url

__all__ = ["OidcError", "OidcSettings", "Person", "Provider"]

_SIGNED = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
    "Ed25519",
)
"""Signatures by a key that only the provider has; `none` and those by a shared secret are not among them."""


class OidcError(FedSigmaError, ValueError):
    """The provider does not answer as one has to, or says nothing by which somebody gets in."""


@settings
class OidcSettings:
    """An OpenID provider, and whom of its people the dashboard lets in.

    Fields: name, of the provider, as the button says it; issuer, its address, https unless it is this
    machine's own; client_id and client_secret_file, by which it knows the dashboard; roles_claim, what it
    calls people's groups or roles (`realm_access.roles` for a claim within another); operators and viewers,
    values of it that make one; name_claim, what it calls a person's name; scopes, what it is asked to tell.
    """

    section: ClassVar[str] = "oidc"

    issuer: str
    client_id: str
    client_secret_file: str
    name: str = "your organisation"
    roles_claim: str = "groups"
    operators: ListOf[str] = ()
    viewers: ListOf[str] = ()
    name_claim: str = "preferred_username"
    scopes: ListOf[str] = ("openid", "profile")

    def __post_init__(self) -> None:
        check_url("oidc.issuer", self.issuer)
        for key in ("name", "client_id", "client_secret_file", "roles_claim", "name_claim"):
            check_printable(f"oidc.{key}", getattr(self, key))
        if not self.operators and not self.viewers:
            raise ConfigError("oidc.operators and oidc.viewers are empty: nobody would get in")
        if "openid" not in self.scopes:
            raise ConfigError("oidc.scopes lacks 'openid', without which nobody's name is told")

    @classmethod
    def read(cls, path: Path) -> OidcSettings:
        """Read a YAML file; client_secret_file is beside it unless it is a whole path.

        Raises:
            ConfigError: it does not read, or holds what does not do.
        """
        content = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
        found = build(cls, content, where=str(path))
        secret = path.parent / Path(found.client_secret_file).expanduser()
        return build(cls, {**content, "client_secret_file": str(secret)}, where=str(path))

    def secret(self) -> str:
        """The client's secret.

        Raises:
            ConfigError: there is no such file, or nothing in it.
        """
        try:
            text = Path(self.client_secret_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"oidc.client_secret_file '{self.client_secret_file}' cannot be read: {error.strerror}"
            ) from None
        check_printable("what oidc.client_secret_file holds", text or " ")
        return text

    def role(self, claims: Mapping[str, Any]) -> str | None:
        """`operator`, `viewer`, or None for who gets in as neither."""
        held = _values(claims, self.roles_claim)
        if held & set(self.operators):
            return OPERATOR
        return VIEWER if held & set(self.viewers) else None


@dataclass(frozen=True, kw_only=True)
class Person:
    """Who signed in at the provider. subject: its own word for the person; role: None gets in nowhere."""

    name: str
    subject: str
    role: str | None


class Provider:
    """The provider, as the dashboard's pages for signing in use it.

    Args:
        settings: where it is, and whom to let in.
        origin: of the dashboard, such as https://fl.example.org.

    Raises:
        ConfigError: the secret cannot be read.
    """

    PATHS: ClassVar[tuple[str, str]] = ("/login/oidc", "/login/oidc/back")
    """Where the way to the provider begins, and where it leads back to: to be registered there."""

    def __init__(self, settings: OidcSettings, *, origin: str) -> None:
        from authlib.integrations.starlette_client import OAuth

        self.settings = settings
        self._back = origin + self.PATHS[1]
        self._client = OAuth().register(
            "provider",
            client_id=settings.client_id,
            client_secret=settings.secret(),
            server_metadata_url=settings.issuer.rstrip("/") + "/.well-known/openid-configuration",
            client_kwargs={"scope": " ".join(settings.scopes), "code_challenge_method": "S256"},
        )

    async def leave(self, request: Request) -> Response:
        """Send the browser to the provider; state, nonce and verifier are kept in the request's session.

        Raises:
            OidcError: the provider is not there, or is another than the settings say.
        """
        await self._check()
        return await self._client.authorize_redirect(request, self._back)

    async def come_back(self, request: Request) -> Person:
        """Who it is whom the provider sent back.

        Raises:
            OidcError: the provider's answer does not do.
            authlib.common.errors.AuthlibBaseError, joserfc.errors.JoseError: it is forged or out of date.
        """
        await self._check()
        wanted = {
            "iss": {"essential": True, "value": self.settings.issuer},
            "aud": {"essential": True, "value": self.settings.client_id},
        }
        token = await self._client.authorize_access_token(request, claims_options=wanted)
        claims = token.get("userinfo")
        if not claims:
            raise OidcError("the provider sent no ID token")
        told = dict(claims)
        if not isinstance(told["sub"], str) or not told["sub"]:
            raise OidcError("the provider does not say who it is")
        if (
            not _values(told, self.settings.roles_claim)
            and "userinfo_endpoint" in self._client.server_metadata
        ):
            more = await self._client.userinfo(token=token)
            if more.get("sub") != told["sub"]:
                raise OidcError("the provider tells of another person than it signed in")
            told = {**more, **told}
        return Person(name=_name(told, self.settings), subject=told["sub"], role=self.settings.role(told))

    async def _check(self) -> None:
        """Read what the provider says of itself, once, and believe no more of it than is needed."""
        known = await self._client.load_server_metadata()
        if known.get("issuer") != self.settings.issuer:
            raise OidcError("the provider calls itself by another name than oidc.issuer")
        for key in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            check_url(f"the provider's {key}", str(known.get(key, "")))
        offered = known.get("id_token_signing_alg_values_supported") or ["RS256"]
        known["id_token_signing_alg_values_supported"] = [name for name in offered if name in _SIGNED]
        if not known["id_token_signing_alg_values_supported"]:
            raise OidcError("the provider signs in no way that is known here")


def _values(claims: Mapping[str, Any], path: str) -> set[str]:
    """What a claim holds: one text or several; `a.b` is b within a, unless there is a claim of that name."""
    found: Any = claims
    for part in [path] if path in claims else path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return {found}
    return {value for value in found if isinstance(value, str)} if isinstance(found, list | tuple) else set()


def _name(claims: Mapping[str, Any], settings: OidcSettings) -> str:
    """The name that the provider tells, if it would do in a log, else its own word for the person."""
    for value in (claims.get(settings.name_claim), claims["sub"]):
        if isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable() and value.strip():
            return value
    raise OidcError("the provider tells no name that can be shown")
