"""Signing in by an OpenID provider: authorization code flow with PKCE, implemented by Authlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from fedsigma.common.config.fields import Check, Line, ListOf
from fedsigma.common.config.schema import ConfigError, build, check_printable, read_yaml, settings
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.dashboard.auth.passwords import OPERATOR, VIEWER
from fedsigma.server.dashboard.auth.urls import check_url

__all__ = ["OidcError", "OidcProvider", "OidcSettings", "OidcUser"]

_ALGORITHMS = (
    *(f"{family}{bits}" for family in ("RS", "PS", "ES") for bits in (256, 384, 512)),
    *("EdDSA", "Ed25519"),
)
"""Accepted signature algorithms: asymmetric only, so neither `none` nor shared secrets."""


class OidcError(FedSigmaError, ValueError):
    """The provider's response is invalid, or lacks the claims that are needed to sign in."""


def _check_scopes(scopes: tuple[str, ...]) -> None:
    if "openid" not in scopes:
        raise ValueError("which lacks 'openid': add it")


@settings
class OidcSettings:
    """An OpenID provider, and the mapping from its users to roles: oidc.yaml in the server's folder."""

    section: ClassVar[str] = "oidc"

    issuer: Annotated[str, Check(check_url, {}), Field(description="URL of the provider.")]
    client_id: Annotated[Line, Field(description="Id of the dashboard at the provider.")]
    client_secret_file: Annotated[
        Line, Field(description="File with the dashboard's secret at the provider, beside oidc.yaml.")
    ]
    name: Annotated[Line, Field(description="Name of the provider on the login page.")] = "your organisation"
    roles_claim: Annotated[
        Line, Field(description="Claim with a user's groups or roles, such as realm_access.roles.")
    ] = "groups"
    operators: Annotated[ListOf[str], Field(description="Values of the claim for the role operator.")] = ()
    viewers: Annotated[ListOf[str], Field(description="Values of the claim for the role viewer.")] = ()
    name_claim: Annotated[Line, Field(description="Claim with a user's name.")] = "preferred_username"
    scopes: Annotated[ListOf[str], Check(_check_scopes, {}), Field(description="Scopes to request.")] = (
        "openid",
        "profile",
    )

    def __post_init__(self) -> None:
        if not self.operators and not self.viewers:
            raise ConfigError("oidc.operators and oidc.viewers are empty: name at least one group")

    @classmethod
    def read(cls, path: Path) -> OidcSettings:
        """Read a YAML file; a relative `client_secret_file` is resolved against its folder.

        Raises:
            ConfigError: The file cannot be parsed, or a value is invalid.
        """
        values = build(cls, read_yaml(path.read_text(encoding="utf-8"), where=str(path)), where=str(path))
        return replace(
            values, client_secret_file=str(path.parent / Path(values.client_secret_file).expanduser())
        )

    def read_secret(self) -> str:
        """Read the client's secret; an unreadable or empty file is a ConfigError."""
        try:
            text = Path(self.client_secret_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"oidc.client_secret_file '{self.client_secret_file}' cannot be read: {error.strerror}"
            ) from None
        check_printable("the content of oidc.client_secret_file", text)
        return text

    def role(self, claims: Mapping[str, Any]) -> str | None:
        """Return `operator`, `viewer`, or None for a user without access."""
        groups = _claim_values(claims, self.roles_claim)
        if groups & set(self.operators):
            return OPERATOR
        return VIEWER if groups & set(self.viewers) else None


@dataclass(frozen=True, kw_only=True)
class OidcUser:
    """A user who signed in at the provider.

    Attributes:
        name: Name of the user.
        subject: The provider's id of the user.
        role: `viewer`, `operator`, or None for a user without access.
    """

    name: str
    subject: str
    role: str | None


class OidcProvider:
    """Client of an OpenID provider; `origin` is that of the dashboard, such as https://fl.example.org."""

    PATHS: ClassVar[tuple[str, str]] = ("/login/oidc", "/login/oidc/back")
    """Paths of the redirect to the provider and of the callback, which is to be registered there."""

    def __init__(self, settings: OidcSettings, *, origin: str) -> None:
        from authlib.integrations.starlette_client import OAuth

        self.settings = settings
        self._callback_url = origin + self.PATHS[1]
        self._client = OAuth().register(
            "provider",
            client_id=settings.client_id,
            client_secret=settings.read_secret(),
            server_metadata_url=settings.issuer.rstrip("/") + "/.well-known/openid-configuration",
            client_kwargs={"scope": " ".join(settings.scopes), "code_challenge_method": "S256"},
        )

    async def redirect_to_provider(self, request: Request) -> Response:
        """Redirect to the provider; state, nonce and verifier are kept in the request's session."""
        await self._check_metadata()
        response: Response = await self._client.authorize_redirect(request, self._callback_url)
        return response

    async def handle_callback(self, request: Request) -> OidcUser:
        """Return the user whom the provider redirected back.

        Raises:
            OidcError: The provider's response is invalid. Authlib and joserfc raise errors of their own for
                responses and ID tokens that are forged or expired.
        """
        await self._check_metadata()
        expected = {
            "iss": {"essential": True, "value": self.settings.issuer},
            "aud": {"essential": True, "value": self.settings.client_id},
        }
        token = await self._client.authorize_access_token(request, claims_options=expected)
        claims = dict(token.get("userinfo") or {})
        if not claims:
            raise OidcError("the provider sent no ID token")
        if not isinstance(claims["sub"], str) or not claims["sub"]:
            raise OidcError("the ID token has no subject")
        if (
            not _claim_values(claims, self.settings.roles_claim)
            and "userinfo_endpoint" in self._client.server_metadata
        ):
            more_claims = await self._client.userinfo(token=token)
            if more_claims.get("sub") != claims["sub"]:
                raise OidcError("the userinfo endpoint returned another user than the ID token")
            claims = {**more_claims, **claims}
        name = _user_name(claims, self.settings.name_claim)
        return OidcUser(name=name, subject=claims["sub"], role=self.settings.role(claims))

    async def _check_metadata(self) -> None:
        """Load the provider's metadata once, and restrict them to safe URLs and algorithms."""
        metadata = await self._client.load_server_metadata()
        if metadata.get("issuer") != self.settings.issuer:
            raise OidcError("the issuer in the provider's metadata differs from oidc.issuer")
        for key in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            try:
                check_url(str(metadata.get(key, "")))
            except ValueError as error:
                raise OidcError(f"the provider's {key} is '{metadata.get(key)}', {error}") from None
        key = "id_token_signing_alg_values_supported"
        metadata[key] = [name for name in metadata.get(key) or ["RS256"] if name in _ALGORITHMS]
        if not metadata[key]:
            raise OidcError(f"the provider supports none of the algorithms {', '.join(_ALGORITHMS)}")


def _claim_values(claims: Mapping[str, Any], path: str) -> set[str]:
    """Return the texts of a claim; `a.b` is b within a, unless there is a claim of that name."""
    value: Any = claims
    for part in [path] if path in claims else path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return {value}
    return {item for item in value if isinstance(item, str)} if isinstance(value, list | tuple) else set()


def _user_name(claims: Mapping[str, Any], name_claim: str) -> str:
    """Return the user's name if it is safe to log, else the subject."""
    for value in (claims.get(name_claim), claims["sub"]):
        if isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable() and value.strip():
            return value
    raise OidcError("the ID token has no printable name or subject")
