"""The routes of the dashboard, and the context that its pages share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, DictLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsigma.common import __version__
from fedsigma.common.registry import ModelError
from fedsigma.server.dashboard.pages.compare import compare_view
from fedsigma.server.dashboard.pages.models import model_rows, render_card
from fedsigma.server.dashboard.pages.prometheus import RunCollector, metrics_page
from fedsigma.server.dashboard.pages.run_index import RunEntry, RunIndex, UnknownRun
from fedsigma.server.dashboard.pages.run_view import View, list_view, run_view
from fedsigma.server.report.style import CHOSEN_SCHEMES, SCHEMES
from fedsigma.server.report.template import TABLE
from fedsigma.server.runs.tail import RunTailer

__all__ = ["DashboardContext", "make_app"]

HERE = Path(__file__).parents[1]
MAX_CACHED_VIEWS = 8
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
_FLUSH = "end of the head"


class DashboardContext:
    """What all pages share.

    Args:
        run_index: The runs.
        pages: Paths and titles for the navigation bar.
    """

    def __init__(self, run_index: RunIndex, pages: tuple[tuple[str, str], ...]) -> None:
        self.run_index = run_index
        self.pages = pages
        self._view = lru_cache(MAX_CACHED_VIEWS)(_view)
        loader = ChoiceLoader([FileSystemLoader(HERE / "templates"), DictLoader({"grids.html": TABLE})])
        self._environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._environment.globals |= {"asset": asset_url, "version": __version__}

    def compile_templates(self) -> None:
        """Compile all templates, so that the first request does not wait for it."""
        for name in self._environment.list_templates(extensions=["html"]):
            self._environment.get_template(name)

    def render(self, request: Request, template: str, **values: Any) -> str:
        """Return a template as HTML; all text from runs and studies is escaped."""
        return "".join(self._generate(request, template, values))

    def _generate(self, request: Request, template: str, values: dict[str, Any]) -> Iterator[str]:
        server = self.run_index.server
        shared = {
            "user": request.state.user,
            "pages": self.pages,
            "current_path": request.url.path,
            "server_name": server.config.name if server else "",
            "flush": "",
            "may_operate": self.may_operate(request),
        }
        return self._environment.get_template(template).generate(**(shared | values))

    def render_page(
        self, request: Request, template: str, *, status: int = 200, **values: Any
    ) -> HTMLResponse:
        """Return a complete page."""
        return HTMLResponse(self.render(request, template, **values), status_code=status)

    def stream_page(self, request: Request, template: str, **values: Any) -> Response:
        """Return a page whose head is sent first, so that the browser loads scripts early."""
        pieces = self._generate(request, template, values | {"flush": _FLUSH})
        # Pieces up to the mark, then the rest.
        parts = ("".join(iter(partial(next, pieces, _FLUSH), _FLUSH)) for _ in range(2))
        return StreamingResponse(parts, media_type="text/html")

    def may_operate(self, request: Request) -> bool:
        """Return whether the user may start, stop and resume runs."""
        user = request.state.user
        return self.run_index.server is not None and user is not None and user.role == "operator"

    def run_view(self, entry: RunEntry) -> tuple[str, View]:
        """Return a tag that identifies the state of a run, and its page; unchanged pages are cached.

        Raises:
            UnknownRun: There is no such run.
        """
        tailer = self.run_index.open_run(entry.key)
        state = tailer.state
        return etag_of(repr((state, entry.summary.state))), self._view(tailer, entry, state)


def _view(tailer: RunTailer, entry: RunEntry, state: tuple[int, ...]) -> View:
    """Return the content of a run's page; `state` is part of the cache's key."""
    return run_view(tailer, entry)


@cache
def static_files() -> dict[str, tuple[bytes, str]]:
    """Return the content of each static file and a hash of it, by name."""
    contents = {path.name: path.read_bytes() for path in (HERE / "static").iterdir()}
    contents["app.css"] = (SCHEMES + CHOSEN_SCHEMES).encode() + contents["app.css"]
    return {name: (content, hashlib.sha256(content).hexdigest()[:12]) for name, content in contents.items()}


def asset_url(name: str) -> str:
    """Return the URL of a static file, with a version that changes with the content."""
    return f"/static/{name}?v={static_files()[name][1]}"


def make_app(context: DashboardContext, extra_routes: list[Route], *, lifespan: Any = None) -> Starlette:
    """Return the app without authentication; wrap it with `require_login`."""
    collector = RunCollector(context.run_index.collect_metrics)

    def route(path: str, handler: Callable[..., Response], *, compressed: bool = False) -> Route:
        # Starlette runs handlers that are not coroutines in a thread. Pages are not compressed: they have
        # CSRF tokens and repeat parameters of the request.
        middleware = [Middleware(GZipMiddleware)] if compressed else []
        return Route(path, partial(handler, context), middleware=middleware)

    routes = [
        route("/", _runs),
        route("/state", _runs_state, compressed=True),
        route("/runs/{key:path}", _run),
        route("/state/{key:path}", _run_state, compressed=True),
        route("/report/{key:path}", _report),
        route("/compare", _compare),
        route("/models", _models),
        route("/models/{reference}", _model),
        route("/static/{name}", _static, compressed=True),
        Route("/health", lambda request: PlainTextResponse("ok\n")),
        Route("/metrics", partial(_metrics, collector)),
        *extra_routes,
    ]

    async def error_page(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        title = {404: "Not found", 403: "Forbidden"}.get(status, "Request failed")
        message = error.detail if isinstance(error, HTTPException) else ""
        if status == 404:
            message = "There is no such page, or the run was removed."
        return context.render_page(request, "error.html", status=status, title=title, message=message)

    handlers = {HTTPException: error_page, UnknownRun: error_page}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def _static(context: DashboardContext, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in static_files():
        raise HTTPException(404)
    # Scripts import modules without the version; these are revalidated each time.
    kept = "private, max-age=31536000, immutable" if request.query_params else "no-cache"
    media_type = MEDIA_TYPES[Path(name).suffix]
    return Response(static_files()[name][0], media_type=media_type, headers={"Cache-Control": kept})


def _metrics(collector: RunCollector, request: Request) -> Response:
    content, content_type = metrics_page(collector, accept=request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})


def _runs(context: DashboardContext, request: Request) -> Response:
    return context.render_page(request, "runs.html", **_runs_list(context))


def _runs_state(context: DashboardContext, request: Request) -> Response:
    html = context.render(request, "runs_list.html", **_runs_list(context))
    return json_response(request, etag_of(html), {"parts": {"live": html}})


def _runs_list(context: DashboardContext) -> dict[str, Any]:
    return {"runs": list_view(context.run_index), "folder": context.run_index.folder.name}


def etag_of(text: str) -> str:
    """Return a short hash of the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_response(request: Request, tag: str, values: dict[str, Any]) -> Response:
    """Return values for a page's script, or status 304 if the request has this `tag` in `If-None-Match`."""
    headers = {"ETag": f'"{tag}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    content = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Response(content, media_type="application/json", headers=headers)


def _run(context: DashboardContext, request: Request) -> Response:
    entry = context.run_index.find_run(request.path_params["key"])
    context.run_index.open_run(entry.key)

    def read() -> dict[str, Any]:
        _, (view, charts) = context.run_view(entry)
        return {"view": view, "charts": _embed_charts(charts)}

    name = entry.summary.study
    return context.stream_page(request, "run.html", name=name, actions=_actions(entry), read=read)


def _embed_charts(charts: dict[str, Any]) -> Markup:
    """Return the charts' series as JSON that cannot close the surrounding script element."""
    return Markup(json.dumps(charts, separators=(",", ":")).replace("<", "\\u003c"))


def _actions(entry: RunEntry) -> list[tuple[str, dict[str, str]]]:
    stop = {"button": "Stop", "confirm": "Stop this run? Finished rounds are kept, and it can be resumed."}
    resume = {"button": "Resume", "confirm": "Resume this run after its last finished round?"}
    actions = {
        "queued": [("stop", stop)],
        "running": [("stop", stop)],
        "interrupted": [("stop", stop), ("resume", resume)],
        "failed": [("resume", resume)],
    }
    return actions.get(entry.summary.state, []) if entry.run_id else []


def _run_state(context: DashboardContext, request: Request) -> Response:
    entry = context.run_index.find_run(request.path_params["key"])
    tag, (view, charts) = context.run_view(entry)
    if request.headers.get("if-none-match") == f'"{tag}"':
        return json_response(request, tag, {})
    values = {"view": view, "actions": _actions(entry)}
    names = ("head", "actions", "tables")
    parts = {name: context.render(request, f"run_{name}.html", **values) for name in names}
    return json_response(request, tag, {"parts": parts, "charts": charts})


def _report(context: DashboardContext, request: Request) -> Response:
    path = context.run_index.open_run(request.path_params["key"]).report_path
    if not path.is_file():
        raise HTTPException(404)
    # A report has inline styles and no scripts; the sandbox gives it no access to the dashboard's origin.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": policy})


def _compare(context: DashboardContext, request: Request) -> Response:
    runs = [row for row in list_view(context.run_index) if row["has_page"]]
    selected = (request.query_params.getlist("run") + [row["key"] for row in runs] + ["", ""])[:2]
    values: dict[str, Any] = {"runs": runs, "selected": selected, "view": None}
    if all(selected):
        view, charts = compare_view(*(context.run_index.open_run(key) for key in selected))
        values |= {"view": view, "charts": _embed_charts(charts)}
    return context.render_page(request, "compare.html", **values)


def _models(context: DashboardContext, request: Request) -> Response:
    rows, errors = model_rows(context.run_index.model_registry)
    return context.render_page(request, "models.html", models=rows, errors=errors)


def _model(context: DashboardContext, request: Request) -> Response:
    reference = request.path_params["reference"]
    try:
        card = render_card(context.run_index.model_registry, reference)
    except ModelError:
        raise HTTPException(404) from None
    return context.render_page(request, "model.html", reference=reference, card=card)
