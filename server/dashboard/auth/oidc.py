"""Signing in by an OpenID provider: authorization code flow with PKCE, implemented by Authlib."""

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

__all__ = ["OidcError", "OidcProvider", "OidcSettings", "OidcUser"]

_ALGORITHMS = (
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
"""Accepted signature algorithms: asymmetric only, so neither `none` nor shared secrets."""


class OidcError(FedSigmaError, ValueError):
    """The provider's response is invalid, or lacks the claims that are needed to sign in."""


@settings
class OidcSettings:
    """An OpenID provider, and the mapping from its users to roles.

    Attributes:
        issuer: URL of the provider; https, or http on this machine.
        client_id: Id of the dashboard at the provider.
        client_secret_file: File with the dashboard's secret at the provider.
        name: Name of the provider, as shown on the login page.
        roles_claim: Claim with a user's groups or roles; `realm_access.roles` is a nested claim.
        operators: Values of the claim that grant the role `operator`.
        viewers: Values of the claim that grant the role `viewer`.
        name_claim: Claim with a user's name.
        scopes: Scopes to request.
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
            raise ConfigError("oidc.operators and oidc.viewers are empty: name at least one group")
        if "openid" not in self.scopes:
            raise ConfigError("oidc.scopes lacks 'openid': add it")

    @classmethod
    def read(cls, path: Path) -> OidcSettings:
        """Read a YAML file; a relative `client_secret_file` is resolved against its folder.

        Args:
            path: The file.

        Raises:
            ConfigError: The file cannot be parsed, or a value is invalid.
        """
        content = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
        found = build(cls, content, where=str(path))
        secret = path.parent / Path(found.client_secret_file).expanduser()
        return build(cls, {**content, "client_secret_file": str(secret)}, where=str(path))

    def read_secret(self) -> str:
        """Read the client's secret.

        Raises:
            ConfigError: The file cannot be read, or is empty.
        """
        try:
            text = Path(self.client_secret_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"oidc.client_secret_file '{self.client_secret_file}' cannot be read: {error.strerror}"
            ) from None
        check_printable("the content of oidc.client_secret_file", text or " ")
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
    """Client of an OpenID provider.

    Args:
        settings: The provider, and the mapping to roles.
        origin: Origin of the dashboard, such as https://fl.example.org.

    Raises:
        ConfigError: The secret cannot be read.
    """

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
        """Redirect to the provider; state, nonce and verifier are kept in the request's session.

        Raises:
            OidcError: The provider's metadata do not match the settings.
        """
        await self._check_metadata()
        return await self._client.authorize_redirect(request, self._callback_url)

    async def handle_callback(self, request: Request) -> OidcUser:
        """Return the user whom the provider redirected back.

        Raises:
            OidcError: The provider's response is invalid.
            authlib.common.errors.AuthlibBaseError: The response is forged or expired.
            joserfc.errors.JoseError: The ID token is forged or expired.
        """
        await self._check_metadata()
        expected = {
            "iss": {"essential": True, "value": self.settings.issuer},
            "aud": {"essential": True, "value": self.settings.client_id},
        }
        token = await self._client.authorize_access_token(request, claims_options=expected)
        userinfo = token.get("userinfo")
        if not userinfo:
            raise OidcError("the provider sent no ID token")
        claims = dict(userinfo)
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
        return OidcUser(
            name=_user_name(claims, self.settings),
            subject=claims["sub"],
            role=self.settings.role(claims),
        )

    async def _check_metadata(self) -> None:
        """Load the provider's metadata once, and restrict them to safe URLs and algorithms."""
        metadata = await self._client.load_server_metadata()
        if metadata.get("issuer") != self.settings.issuer:
            raise OidcError("the issuer in the provider's metadata differs from oidc.issuer")
        for key in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            check_url(f"the provider's {key}", str(metadata.get(key, "")))
        key = "id_token_signing_alg_values_supported"
        metadata[key] = [name for name in metadata.get(key) or ["RS256"] if name in _ALGORITHMS]
        if not metadata[key]:
            raise OidcError(
                f"the provider supports none of the signature algorithms {', '.join(_ALGORITHMS)}"
            )


def _claim_values(claims: Mapping[str, Any], path: str) -> set[str]:
    """Return the texts of a claim; `a.b` is b within a, unless there is a claim of that name."""
    value: Any = claims
    for part in [path] if path in claims else path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return {value}
    return {item for item in value if isinstance(item, str)} if isinstance(value, list | tuple) else set()


def _user_name(claims: Mapping[str, Any], settings: OidcSettings) -> str:
    """Return the user's name if it is safe to log, else the subject."""
    for value in (claims.get(settings.name_claim), claims["sub"]):
        if isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable() and value.strip():
            return value
    raise OidcError("the ID token has no printable name or subject")
