"""The login page. Its style is inline, because static files require a session."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from fedsigma.server.report.style import SCHEMES

__all__ = ["login_page"]

_STYLE = (
    SCHEMES
    + """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans); }
main { width: 100%; max-width: 23rem; }
.kicker { margin: 0 0 .35rem; color: var(--muted); font-size: .875rem; }
h1 { margin: 0 0 1.6rem; font: 600 2rem/1.15 var(--serif); letter-spacing: -.01em; }
label { display: block; margin: 0 0 .3rem; font-size: .9375rem; }
input { width: 100%; margin: 0 0 1.1rem; padding: .6rem .7rem; font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--muted); border-radius: 4px; }
button, .provider { display: block; width: 100%; padding: .65rem .9rem; font: inherit; font-weight: 600;
  text-align: center; text-decoration: none; border: 1px solid var(--accent); border-radius: 4px;
  cursor: pointer; }
button { color: var(--paper); background: var(--accent); }
.provider { color: var(--accent); }
form + .provider { margin-top: .9rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.alarm { margin: 0 0 1.4rem; padding: .8rem 1.1rem; border-left: 3px solid var(--alarm);
  background: var(--alarm-panel); }
.note { margin: 1.4rem 0 0; color: var(--muted); font-size: .875rem; }
code { font: .8125rem/1.6 var(--mono); }
"""
)
_POLICY = (
    "default-src 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% if error %}Error: {% endif %}Sign in – FedSigma</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<main>
<p class="kicker">FedSigma</p>
<h1>Sign in</h1>
{%- if error %}
<p class="alarm" id="error" role="alert">{{ error }}</p>
{%- endif %}
{%- set described = ' aria-describedby="error"'|safe if error else "" %}
{%- if passwords %}
<form method="post" action="/login">
<input type="hidden" name="next" value="{{ next }}">
<label for="name">Name</label>
<input id="name" name="name" value="{{ name }}" maxlength="64" autocomplete="username" autocapitalize="none"
 spellcheck="false" required{{ described }}{% if not name %} autofocus{% endif %}>
<label for="password">Password</label>
<input id="password" name="password" type="password" maxlength="128" autocomplete="current-password"
 required{{ described }}{% if name %} autofocus{% endif %}>
<button type="submit">Sign in</button>
</form>
{%- endif %}
{%- if provider %}
<a class="provider" href="/login/oidc?next={{ next|urlencode }}">Sign in with {{ provider }}</a>
{%- endif %}
{%- if not passwords and not provider %}
<p>Open the link that <code>fedsigma dashboard</code> printed when it was started. The link works once;
restart the command for a new one.</p>
{%- endif %}
{%- if passwords %}
<p class="note">The server's administrator creates names and passwords.</p>
{%- endif %}
</main>
</body>
</html>
"""
_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined)


def login_page(
    *,
    passwords: bool,
    provider: str = "",
    next_path: str = "/",
    name: str = "",
    error: str = "",
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> HTMLResponse:
    """Return the login page.

    Args:
        passwords: Whether users can sign in by name and password.
        provider: Name of the OpenID provider, if there is one.
        next_path: Path to redirect to after signing in.
        name: Name to fill in.
        error: Error message.
        status: Status of the response.
        headers: Additional headers of the response.
    """
    html = _ENVIRONMENT.from_string(_TEMPLATE).render(
        style=Markup(_STYLE), passwords=passwords, provider=provider, next=next_path, name=name, error=error
    )
    return HTMLResponse(html, status, headers={"Content-Security-Policy": _POLICY, **(headers or {})})
